# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
OFT: orthogonal fine-tuning, which rotates the inputs of a layer in blocks.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, arXiv:2306.07280; in the form of
Qiu et al., "Orthogonal Finetuning Made Scalable", 2025, arXiv:2506.19847.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "OFT",
    "peft.tuners.oft.config:OFTConfig",
    "peft.tuners.oft.model:OFTModel",
    prefix="oft_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["OFTConfig"],
        ".layer": ["Conv2d", "Embedding", "Linear", "OFTLayer"],
        ".model": ["OFTModel"],
    },
)
