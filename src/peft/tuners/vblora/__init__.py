# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
VB-LoRA: low-rank factors put together from vectors of a bank that all layers share.

Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024, arXiv:2405.15179.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "VBLORA", "peft.tuners.vblora.config:VBLoRAConfig", "peft.tuners.vblora.model:VBLoRAModel", prefix="vblora_"
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".config": ["VBLoRAConfig"], ".layer": ["Linear", "VBLoRALayer"], ".model": ["VBLoRAModel"]}
)
