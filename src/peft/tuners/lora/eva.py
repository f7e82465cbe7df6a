# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: EVA, as the released package has it in one module."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.calibration.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
        "peft.tuners.lora.calibration.eva_rows": [
            "forward_fn_dict",
            "prepare_layer_inputs_fn_language_modeling",
            "prepare_model_inputs_fn_language_modeling",
        ],
        "peft.utils.incremental_pca": ["IncrementalPCA"],
        "peft.utils.constants": ["MIN_TARGET_MODULES_FOR_OPTIMIZATION"],
        "peft.anatomy.matching": ["check_target_module_exists", "get_pattern_key"],
        "peft.tuners.lora.config": ["LoraConfig"],
        "peft.tuners.lora.layer": ["Embedding", "LoraLayer", "MultiheadAttention"],
    },
)
