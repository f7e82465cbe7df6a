# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
SHiRA: a sparse update of high rank.

Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv:2406.13175.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "SHIRA", "peft.tuners.shira.config:ShiraConfig", "peft.tuners.shira.model:ShiraModel", is_mixed_compatible=True
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["ShiraConfig"],
        ".layer": ["Linear", "ShiraLayer"],
        ".model": ["ShiraModel"],
    },
)
