# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
DeLoRA: a low-rank update whose directions are normalised, and whose strength is one trained number.

Bini, Girrbach, Akata, "Decoupling Angles and Strength in Low-rank Adaptation", 2025, arXiv:2503.18225.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("DELORA", "peft.tuners.delora.config:DeloraConfig", "peft.tuners.delora.model:DeloraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["DeloraConfig"],
        ".layer": ["DeloraLayer", "DeloraLinear"],
        ".model": ["DeloraModel"],
    },
)
