# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
X-LoRA: trained LoRA adapters become experts, which a classifier on the model's hidden states weighs for each token.

Buehler, Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", 2024, arXiv:2402.07148.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("XLORA", "peft.tuners.xlora.config:XLoraConfig", "peft.tuners.xlora.model:XLoraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["XLoraConfig"],
        ".model": ["XLoraModel"],
    },
)
