# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
BOFT: orthogonal fine-tuning by a product of sparse rotations, as in a butterfly network.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023, arXiv:2311.06243.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("BOFT", "peft.tuners.boft.config:BOFTConfig", "peft.tuners.boft.model:BOFTModel", prefix="boft_")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".config": ["BOFTConfig"], ".layer": ["BOFTLayer"], ".model": ["BOFTModel"]}
)
