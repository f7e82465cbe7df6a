# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
FRoD: weights of one role share a basis; what is trained are their scales in it, and a sparse core.

Wan et al., "Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence", 2025, arXiv:2512.23485.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("FROD", "peft.tuners.frod.config:FrodConfig", "peft.tuners.frod.model:FrodModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["FrodConfig"],
        ".layer": ["FrodLayer", "Linear"],
        ".model": ["FrodModel"],
    },
)
