# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods: one package each, which enters itself into the registry."""

from ..utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".adalora.config": ["AdaLoraConfig"],
        ".adalora.model": ["AdaLoraModel"],
        ".boft.config": ["BOFTConfig"],
        ".boft.model": ["BOFTModel"],
        ".fourierft.config": ["FourierFTConfig"],
        ".fourierft.model": ["FourierFTModel"],
        ".hra.config": ["HRAConfig"],
        ".hra.model": ["HRAModel"],
        ".loha.config": ["LoHaConfig"],
        ".loha.model": ["LoHaModel"],
        ".lokr.config": ["LoKrConfig"],
        ".lokr.model": ["LoKrModel"],
        ".ia3.config": ["IA3Config"],
        ".ia3.model": ["IA3Model"],
        ".ln_tuning.config": ["LNTuningConfig"],
        ".ln_tuning.model": ["LNTuningModel"],
        ".lora.config": [
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
        ".lora.model": ["LoraModel"],
        ".mixed.model": ["MixedModel"],
        ".multitask_prompt_tuning.config": ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"],
        ".multitask_prompt_tuning.model": ["MultitaskPromptEmbedding"],
        ".oft.config": ["OFTConfig"],
        ".oft.model": ["OFTModel"],
        ".p_tuning.config": ["PromptEncoderConfig", "PromptEncoderReparameterizationType"],
        ".p_tuning.model": ["PromptEncoder"],
        ".prefix_tuning.config": ["PrefixTuningConfig"],
        ".prefix_tuning.model": ["PrefixEncoder"],
        ".prompt_tuning.config": ["PromptTuningConfig", "PromptTuningInit"],
        ".prompt_tuning.model": ["PromptEmbedding"],
        ".vblora.config": ["VBLoRAConfig"],
        ".vblora.model": ["VBLoRAModel"],
        ".vera.config": ["VeraConfig"],
        ".vera.model": ["VeraModel"],
        ".trainable_tokens.config": ["TrainableTokensConfig"],
        ".trainable_tokens.model": ["TrainableTokensModel"],
    },
)
