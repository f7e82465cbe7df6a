# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Uni-LoRA: every entry of the factors of LoRA is taken from one trained vector.

Li et al., "Uni-LoRA: One Vector is All You Need", 2025, arXiv:2506.00799.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("UNILORA", "peft.tuners.unilora.config:UniLoraConfig", "peft.tuners.unilora.model:UniLoraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["UniLoraConfig"],
        ".layer": ["Linear", "UniLoraLayer"],
        ".model": ["UniLoraModel"],
    },
)
