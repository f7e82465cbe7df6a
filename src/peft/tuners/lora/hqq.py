# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.lora.hqq`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.quantized": ["HqqLoraLinear", "dispatch_hqq"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.tuners.lora.config": ["LoraConfig"],
        "peft.tuners.lora.layer": ["LoraLayer"],
        "peft.tuners.lora.variants.base": ["LoraVariant"],
        "peft.layers.merging.checks": ["check_adapters_to_merge"],
        "peft.anatomy.kinds": ["transpose"],
    },
)
