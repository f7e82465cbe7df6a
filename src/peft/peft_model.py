# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.peft_model`, and where it is."""

from .utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.checkpoints.read_file": ["load_peft_weights"],
        "peft.config": ["PeftConfig"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.layers.training_wrapper": ["AuxiliaryTrainingWrapper"],
        "peft.models.peft_model": ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftModel"],
        "peft.models.status": ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"],
        "peft.models.tasks": [
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
        ],
        "peft.registry": [
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_PREFIX_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "PeftType",
            "TaskType",
        ],
        "peft.tuners.base": ["BaseTuner"],
        "peft.utils.constants": [
            "DUMMY_MODEL_CONFIG",
            "SAFETENSORS_WEIGHTS_NAME",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "WEIGHTS_NAME",
        ],
        "peft.layers.token_wrapper": ["TrainableTokensWrapper"],
        "peft.checkpoints.state_dict": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
        "peft.utils.devices": ["infer_device", "map_cache_to_layer_device_map"],
        "peft.utils.integrations": ["init_empty_weights"],
        "peft.surgery.saved_modules": ["set_additional_trainable_modules"],
        "peft.utils.labels": ["shift_tokens_right"],
        "peft.utils.model_inputs": ["create_attention_mask"],
        "transformers.pytorch_utils": ["id_tensor_storage"],
        "peft.tuners.lora.variants": ["get_alora_offsets_for_forward", "get_alora_offsets_for_generate"],
    },
)
