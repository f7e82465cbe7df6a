# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
FourierFT: a sparse spectrum of the update.

Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024, arXiv:2405.03003.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("FOURIERFT", "peft.tuners.fourierft.config:FourierFTConfig", "peft.tuners.fourierft.model:FourierFTModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["FourierFTConfig"],
        ".layer": ["FourierFTLayer", "FourierFTLinear"],
        ".model": ["FourierFTModel"],
    },
)
