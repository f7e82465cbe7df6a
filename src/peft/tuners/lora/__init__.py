# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA: low-rank adaptation of weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "LORA",
    "peft.tuners.lora.config:LoraConfig",
    "peft.tuners.lora.model:LoraModel",
    prefix="lora_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".calibration.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
        ".calibration.lora_ga": ["preprocess_loraga"],
        ".config": [
            "ArrowConfig",
            "BdLoraConfig",
            "EvaConfig",
            "KasaConfig",
            "LoftQConfig",
            "LoraConfig",
            "LoraGAConfig",
            "LoraRuntimeConfig",
            "MontecloraConfig",
            "VeloraConfig",
        ],
        ".conversion": ["convert_to_lora", "save_as_lora"],
        ".layer": ["Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "ParamWrapper"],
        ".model": ["LoraModel"],
        "peft.models.arrow": ["create_arrow_model"],
        ".starts": ["Start", "register_start"],
        ".variants": ["LoraVariant", "register_variant"],
        "peft.registry": ["register_peft_method"],
        ".quantized": ["GPTQLoraLinear"],
    },
)
