# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Helpers that methods and models share; names are resolved on first use."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".constants": [
            "ALLOWED_COMPUTE_DTYPES",
            "CONFIG_NAME",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "TRANSFORMERS_MODELS_TO_*",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "UPCAST_DTYPES",
            "WEIGHTS_NAME",
        ],
        ".error": ["NoMatchingPeftModuleError", "PeftError"],
        "peft.surgery.kbit_training": ["prepare_model_for_kbit_training"],
        ".integrations": ["gather_params_ctx"],
        "peft.checkpoints.load_report": ["LoadReport", "PeftLoadError"],
        "peft.anatomy.kinds": ["transpose"],
        "peft.anatomy.matching": ["_is_valid_match", "get_pattern_key"],
        "peft.anatomy.walking": ["_get_submodules"],
        "peft.layers.modules_to_save": ["ModulesToSaveWrapper"],
        "peft.layers.token_wrapper": ["TrainableTokensWrapper"],
        "peft.layers.training_wrapper": ["AuxiliaryTrainingWrapper"],
        "peft.surgery.saved_modules": ["_set_trainable", "set_additional_trainable_modules"],
        "peft.surgery.switching": ["_freeze_adapter", "_set_adapter", "cast_mixed_precision_params"],
        "peft.tuners.lora.loftq": ["replace_lora_weights_loftq"],
        "peft.utils.devices": ["infer_device"],
        "peft.utils.labels": ["shift_tokens_right"],
        "peft.registry": ["PeftType", "TaskType", "register_peft_method"],
        ".quantization_utils": [
            "get_gptqmodel_quant_linear",
            "get_quantization_config",
            "get_quantization_kwargs",
            "quantization_extra_repr",
            "resolve_quantization_backend",
        ],
        "peft.checkpoints.base_state_dict": ["get_base_model_state_dict", "set_base_model_state_dict"],
        "peft.checkpoints.read_file": ["load_peft_weights"],
        "peft.checkpoints.state_dict": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
        ".warning": ["PeftWarning"],
        ".old_cache_layouts": ["bloom_model_postprocess_past_key_value"],
        "transformers.pytorch_utils": ["id_tensor_storage"],
        ".devices": ["map_cache_to_layer_device_map"],
        ".model_inputs": ["_get_batch_size"],
        "peft.anatomy.embeddings": ["_get_input_embeddings_name"],
        "peft.prompts.sizes": ["_prepare_prompt_learning_config"],
    },
)
