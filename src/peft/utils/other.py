# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.other`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.anatomy.matching": ["_is_valid_match", "get_pattern_key", "match_target_against_key"],
        "peft.layers.modules_to_save": ["ModulesToSaveWrapper"],
        "peft.layers.token_wrapper": ["TrainableTokensWrapper"],
        "peft.layers.training_wrapper": ["AuxiliaryTrainingWrapper"],
        "peft.surgery.kbit_training": ["prepare_model_for_kbit_training"],
        "peft.anatomy.kinds": ["transpose"],
        "peft.anatomy.walking": ["_get_submodules"],
        "peft.utils.labels": ["shift_tokens_right"],
        "peft.surgery.saved_modules": ["_set_trainable", "set_additional_trainable_modules"],
        "peft.surgery.switching": ["_freeze_adapter", "_set_adapter", "cast_mixed_precision_params"],
        "peft.utils.devices": ["infer_device"],
        "peft.utils.hub": ["check_file_exists_on_hf_hub"],
        "peft.utils.constants": [
            "CONFIG_NAME",
            "EMBEDDING_LAYER_NAMES",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "TRANSFORMERS_MODELS_TO_*",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "WEIGHTS_NAME",
        ],
        "peft.utils.fsdp": ["fsdp_auto_wrap_policy"],
        "peft.utils.quantization_utils": [
            "get_gptqmodel_quant_linear",
            "get_quantization_config",
            "is_gptqmodel_awq_layer",
            "is_gptqmodel_quant_linear",
        ],
        "peft.utils.old_cache_layouts": [
            "bloom_model_postprocess_past_key_value",
            "starcoder_model_postprocess_past_key_value",
        ],
        "transformers.pytorch_utils": ["id_tensor_storage"],
        "accelerate.utils": ["str_to_bool"],
        "peft.utils.model_inputs": ["_get_batch_size", "create_attention_mask"],
        "peft.anatomy.embeddings": ["_get_input_embeddings_name"],
        "peft.prompts.sizes": ["_prepare_prompt_learning_config"],
    },
)
