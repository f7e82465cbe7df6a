# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
ShadowPEFT: a small trained model beside the frozen one, whose state each block is corrected by.

Li et al., "ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning", 2026, arXiv:2604.19254.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("SHADOW", "peft.tuners.shadow.config:ShadowConfig", "peft.tuners.shadow.model:ShadowModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".cache": ["ShadowCache"],
        ".config": ["ShadowConfig"],
        ".detached": ["DetachedShadowModel"],
        ".layer": ["ShadowCarrier", "ShadowLayer"],
        ".model": ["ShadowModel"],
    },
)
