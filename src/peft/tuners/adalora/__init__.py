# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
AdaLoRA: low-rank adaptation that hands out its ranks where they matter.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, arXiv:2303.10512.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "ADALORA",
    "peft.tuners.adalora.config:AdaLoraConfig",
    "peft.tuners.adalora.model:AdaLoraModel",
    prefix="lora_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".allocation": ["RankAllocator"],
        ".config": ["AdaLoraConfig"],
        ".layer": ["AdaLoraLayer", "SVDConv2d", "SVDLinear"],
        ".model": ["AdaLoraModel"],
        ".quantized": ["SVDQuantLinear"],
    },
)
