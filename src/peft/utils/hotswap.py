# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.hotswap`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.anatomy.matching": ["get_pattern_key"],
        "peft.checkpoints.read_file": ["load_peft_weights"],
        "peft.config": ["PeftConfig"],
        "peft.hotswap": [
            "CONFIG_KEYS_TO_CHECK",
            "check_hotswap_configs_compatible",
            "hotswap_adapter",
            "hotswap_adapter_from_state_dict",
            "prepare_model_for_compiled_hotswap",
        ],
        "peft.tuners.lora.config": ["LoraConfig"],
        "peft.tuners.lora.layer": ["Conv2d", "Linear", "LoraLayer"],
        "peft.registry": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PeftType"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.utils.devices": ["infer_device"],
    },
)
