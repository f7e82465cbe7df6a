# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.lora.arrow`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.models.arrow": [
            "check_loaded_lora_compatibility_arrow",
            "create_arrow_model",
            "ensure_adapters_target_linear_layers_only",
        ],
        "peft.tuners.lora.config": ["ArrowConfig"],
        "peft.tuners.lora.variants.arrow": ["ArrowLoraLinearLayer", "GKS_ADAPTER_PREFIX", "TASK_ADAPTER_PREFIX"],
    },
)
