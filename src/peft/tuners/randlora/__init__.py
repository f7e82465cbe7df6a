# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
RandLoRA: updates of full rank from random bases that all layers share, of which the scalings are trained.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025, arXiv:2502.00987.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("RANDLORA", "peft.tuners.randlora.config:RandLoraConfig", "peft.tuners.randlora.model:RandLoraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["RandLoraConfig"],
        ".layer": ["Linear", "RandLoraLayer"],
        ".model": ["RandLoraModel"],
    },
)
