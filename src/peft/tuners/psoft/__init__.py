# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
PSOFT: the principal subspace of a weight is rotated and stretched.

Wu, Hu, Min, Wang, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", 2025, arXiv:2505.11235.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("PSOFT", "peft.tuners.psoft.config:PsoftConfig", "peft.tuners.psoft.model:PsoftModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["PsoftConfig"],
        ".layer": ["Linear", "OrthLayer", "PsoftLayer"],
        ".model": ["PsoftModel"],
    },
)
