# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
GLoRA: weight and bias are scaled and shifted, entry by entry.

Chavan, Liu, Gupta, Xing, Shen, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023,
arXiv:2306.07967.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("GLORA", "peft.tuners.glora.config:GloraConfig", "peft.tuners.glora.model:GloraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["GloraConfig"],
        ".layer": ["GloraLayer", "GloraLinear"],
        ".model": ["GloraModel"],
    },
)
