# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
DEFT: what a weight writes into a few directions is replaced.

Kumar et al., "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", 2025, arXiv:2509.22793.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("DEFT", "peft.tuners.deft.config:DeftConfig", "peft.tuners.deft.model:DeftModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["DeftConfig"],
        ".layer": ["DeftLayer", "DeftLinear"],
        ".model": ["DeftModel"],
    },
)
