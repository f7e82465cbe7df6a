# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Poly: each layer has several low-rank skills, and each task its own mixture of them.

Ponti et al., "Combining Modular Skills in Multitask Learning", 2022, arXiv:2202.13914.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("POLY", "peft.tuners.poly.config:PolyConfig", "peft.tuners.poly.model:PolyModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["PolyConfig"],
        ".layer": ["Linear", "PolyLayer"],
        ".model": ["PolyModel"],
    },
)
