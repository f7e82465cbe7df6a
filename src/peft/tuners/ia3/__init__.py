# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
IA3: learned factors for keys, values and hidden features.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
arXiv:2205.05638.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "IA3",
    "peft.tuners.ia3.config:IA3Config",
    "peft.tuners.ia3.model:IA3Model",
    prefix="ia3_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["IA3Config"],
        ".layer": ["Conv2d", "Conv3d", "IA3Layer", "Linear"],
        ".model": ["IA3Model"],
    },
)
