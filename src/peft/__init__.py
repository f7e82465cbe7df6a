# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Parameter-efficient fine-tuning in which tied weights stay tied.

Public names are resolved on first use: `import peft` loads neither torch nor transformers.
"""

from .utils.lazy import lazy_exports


# The lowest that the newest clients ask for (transformers 5.24: 0.22.0). What files name is in `config.py`.
__version__ = "0.22.0+tied.1"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".auto": [
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ],
        ".config": ["PeftConfig", "PromptLearningConfig"],
        ".helpers": ["find_kappa_target_modules"],
        ".mapping": [
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "get_peft_config",
            "inject_adapter_in_model",
        ],
        ".mapping_func": ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "get_peft_model"],
        ".models.mixed": ["PeftMixedModel"],
        ".models.peft_model": ["PeftModel"],
        ".models.status": ["get_layer_status", "get_model_status"],
        ".models.tasks": [
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
        ],
        ".tuners.adalora.config": ["AdaLoraConfig"],
        ".tuners.adalora.model": ["AdaLoraModel"],
        ".tuners.boft.config": ["BOFTConfig"],
        ".tuners.boft.model": ["BOFTModel"],
        ".tuners.c3a.config": ["C3AConfig"],
        ".tuners.c3a.model": ["C3AModel"],
        ".tuners.fourierft.config": ["FourierFTConfig"],
        ".tuners.fourierft.model": ["FourierFTModel"],
        ".tuners.gralora.config": ["GraloraConfig"],
        ".tuners.gralora.model": ["GraloraModel"],
        ".tuners.hra.config": ["HRAConfig"],
        ".tuners.hra.model": ["HRAModel"],
        ".tuners.loha.config": ["LoHaConfig"],
        ".tuners.loha.model": ["LoHaModel"],
        ".tuners.lokr.config": ["LoKrConfig"],
        ".tuners.lokr.model": ["LoKrModel"],
        ".tuners.ia3.config": ["IA3Config"],
        ".tuners.ia3.model": ["IA3Model"],
        ".tuners.ln_tuning.config": ["LNTuningConfig"],
        ".tuners.ln_tuning.model": ["LNTuningModel"],
        ".tuners.lora.config": [
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
        ".tuners.lora.model": ["LoraModel"],
        ".tuners.multitask_prompt_tuning.config": ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"],
        ".tuners.oft.config": ["OFTConfig"],
        ".tuners.oft.model": ["OFTModel"],
        ".tuners.p_tuning.config": ["PromptEncoderConfig", "PromptEncoderReparameterizationType"],
        ".tuners.p_tuning.model": ["PromptEncoder"],
        ".tuners.prefix_tuning.config": ["PrefixTuningConfig"],
        ".tuners.prefix_tuning.model": ["PrefixEncoder"],
        ".tuners.prompt_tuning.config": ["PromptTuningConfig", "PromptTuningInit"],
        ".tuners.prompt_tuning.model": ["PromptEmbedding"],
        ".tuners.vblora.config": ["VBLoRAConfig"],
        ".tuners.vblora.model": ["VBLoRAModel"],
        ".tuners.vera.config": ["VeraConfig"],
        ".tuners.vera.model": ["VeraModel"],
        ".tuners.trainable_tokens.config": ["TrainableTokensConfig"],
        ".tuners.trainable_tokens.model": ["TrainableTokensModel"],
        ".utils.error": ["NoMatchingPeftModuleError", "PeftError"],
        ".surgery.kbit_training": ["prepare_model_for_kbit_training"],
        ".surgery.switching": ["cast_mixed_precision_params"],
        ".utils.labels": ["shift_tokens_right"],
        ".registry": ["PeftType", "TaskType"],
        ".checkpoints.base_state_dict": ["get_base_model_state_dict", "set_base_model_state_dict"],
        ".checkpoints.read_file": ["load_peft_weights"],
        ".checkpoints.state_dict": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
        ".planning": ["plan_weight_tying"],
        ".tying.report": ["weight_tying_report"],
        ".utils.warning": ["PeftWarning"],
        ".utils.constants": ["TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"],
    },
)
