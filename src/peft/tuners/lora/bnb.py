# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.lora.bnb`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.quantized": ["Linear4bit", "Linear8bitLt", "dispatch_bnb_4bit", "dispatch_bnb_8bit"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.tuners.lora.config": ["LoraConfig"],
        "peft.tuners.lora.layer": ["LoraLayer"],
        "peft.layers.merging.checks": ["check_adapters_to_merge"],
        "peft.utils.quantization_utils": ["dequantize_bnb_weight"],
    },
)
