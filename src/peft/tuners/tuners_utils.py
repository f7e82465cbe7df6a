# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.tuners_utils`, and where it is."""

from ..utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.anatomy.matching": ["_ExcludedModule", "check_target_module_exists", "match_target_against_key"],
        "peft.config": ["PeftConfig"],
        "peft.layers.activation": ["ActivationLayer"],
        "peft.layers.additive": ["AdditiveLayer"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.layers.merging.checks": ["check_adapters_to_merge"],
        "peft.layers.replacement": ["ReplacementLayer"],
        "peft.layers.training_wrapper": ["AuxiliaryTrainingWrapper"],
        "peft.layers.weight": ["WeightLayer"],
        "peft.prompts.encoder": ["BasePromptEncoder"],
        "peft.surgery.replication": ["clone_module", "replicate_layers"],
        "peft.surgery.saved_modules": ["set_additional_trainable_modules"],
        "peft.surgery.switching": ["cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"],
        "peft.tuners.base": ["BaseTuner"],
        "peft.tuners.targets": ["UnsupportedLayerError"],
        "peft.utils.constants": [
            "DUMMY_MODEL_CONFIG",
            "DUMMY_TARGET_MODULES",
            "EMBEDDING_LAYER_NAMES",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
            "SEQ_CLS_HEAD_NAMES",
            "UPCAST_DTYPES",
        ],
        "peft.utils.error": ["NoMatchingPeftModuleError"],
        "peft.layers.buffer_dict": ["BufferDict"],
        "peft.registry": ["PEFT_TYPE_TO_PREFIX_MAPPING", "PeftType", "TaskType"],
        "peft.utils.warning": ["PeftWarning"],
        "peft.utils.quantization_utils": ["QuantizationBackend", "is_gptqmodel_quant_linear"],
        "peft.utils.integrations": ["init_empty_weights"],
        "peft.anatomy.walking": ["find_parameter_name_by_module"],
        "peft.utils.devices": ["get_device_map"],
        "peft.tuners.inspection": ["inspect_matched_modules"],
        "peft.anatomy.offload": ["onload_layer"],
        "peft.anatomy.all_linear": ["_maybe_include_all_linear_layers"],
    },
)
