# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Names that release 0.21.2 lets one import from a module which only uses them, so that such imports go on to work.

A file that is nothing but an old path is a table of names itself (`lazy.py`); these are modules that hold code. A
module takes part with a line at its end: `__getattr__ = old_names(__name__)`. Packages with a table take part by it.
"""

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any


# where the names are, the names, and the modules of this package that give them too
_ROWS: tuple[tuple[str, str, str], ...] = (
    (
        "peft.anatomy.kinds",
        "transpose",
        (
            "tuners.adalora.layer tuners.fourierft.layer tuners.ia3.layer tuners.lora.layer tuners.lora.tp_layer "
            "tuners.lora.variants tuners.lora.variants.dora tuners.vblora.layer tuners.vera.layer"
        ),
    ),
    ("peft.anatomy.matching", "get_pattern_key", "tuners.loha.model tuners.lokr.model tuners.lora.model"),
    ("peft.checkpoints.state_dict", "get_peft_model_state_dict", "tuners.lora.model"),
    ("peft.config", "PromptLearningConfig", "mapping_func"),
    ("peft.config", "PeftConfig", "tuners.ln_tuning.model tuners.lora.variants"),
    (
        "peft.layers.base_layer",
        "BaseTunerLayer",
        (
            "tuners.adalora.model tuners.boft.layer tuners.boft.model tuners.fourierft.layer tuners.fourierft.model "
            "tuners.hra.model tuners.ia3.layer tuners.ia3.model tuners.ln_tuning.layer tuners.lora.model "
            "tuners.oft.layer tuners.oft.model tuners.vblora.layer tuners.vblora.model tuners.vera.layer "
            "tuners.vera.model"
        ),
    ),
    (
        "peft.layers.buffer_dict",
        "BufferDict",
        "tuners.lora.layer tuners.lora.variants tuners.vera.layer tuners.vera.model",
    ),
    (
        "peft.layers.merging.checks",
        "check_adapters_to_merge",
        (
            "tuners.adalora.layer tuners.boft.layer tuners.fourierft.layer tuners.ia3.layer "
            "tuners.ln_tuning.layer tuners.lora.tp_layer tuners.oft.layer tuners.vblora.layer tuners.vera.layer"
        ),
    ),
    ("peft.layers.modules_to_save", "ModulesToSaveWrapper", "tuners.ia3.model tuners.lora.model tuners.mixed.model"),
    ("peft.layers.training_wrapper", "AuxiliaryTrainingWrapper", "tuners.lora.model"),
    (
        "peft.registry",
        "register_peft_method",
        (
            "tuners.adalora tuners.adamss tuners.adaption_prompt tuners.beft tuners.boft tuners.c3a "
            "tuners.cartridge tuners.cpt tuners.deft tuners.delora tuners.fourierft tuners.frod tuners.glora "
            "tuners.gralora tuners.hira tuners.hra tuners.ia3 tuners.lily tuners.ln_tuning tuners.loha "
            "tuners.lokr tuners.miss tuners.multitask_prompt_tuning tuners.oft tuners.osf tuners.p_tuning "
            "tuners.peanut tuners.poly tuners.prefix_tuning tuners.prompt_tuning tuners.psoft tuners.pvera "
            "tuners.randlora tuners.road tuners.shadow tuners.shira tuners.supertuning tuners.tinylora "
            "tuners.trainable_tokens tuners.unilora tuners.vblora tuners.vera tuners.waveft tuners.xlora"
        ),
    ),
    ("peft.registry", "TaskType", "tuners.multitask_prompt_tuning.model"),
    ("peft.tuners", "adalora loha lokr lora oft", "tuners.mixed.model"),
    (
        "peft.tuners.base",
        "BaseTuner",
        (
            "tuners.boft.model tuners.fourierft.model tuners.hra.model tuners.ia3.model tuners.oft.model "
            "tuners.vblora.model"
        ),
    ),
    (
        "peft.tuners.adamss.maths",
        "clustering_Z get_trainable_subspaces seg_locations slice_pca",
        "tuners.adamss.layer",
    ),
    ("peft.tuners.boft.layer", "BOFTLayer Conv2d Linear", "tuners.boft.model"),
    (
        "peft.tuners.boft.maths",
        "FastBlockDiag MultiplicativeDropoutLayer get_fbd_cuda patch_environment",
        "tuners.boft.layer",
    ),
    ("peft.tuners.families.lycoris", "LycorisConfig LycorisTuner", "tuners.loha.model tuners.lokr.model"),
    ("peft.tuners.fourierft.layer", "FourierFTLayer FourierFTLinear", "tuners.fourierft.model"),
    ("peft.tuners.hra.layer", "HRAConv2d HRALayer HRALinear", "tuners.hra.model"),
    ("peft.tuners.ia3.layer", "Conv2d Conv3d IA3Layer Linear", "tuners.ia3.model"),
    ("peft.tuners.ln_tuning.config", "LNTuningConfig", "tuners.ln_tuning.layer"),
    ("peft.tuners.loha.layer", "Conv1d Conv2d Linear LoHaLayer", "tuners.loha.model"),
    ("peft.tuners.lokr.layer", "Conv1d Conv2d Linear LoKrLayer", "tuners.lokr.model"),
    ("peft.tuners.lora.config", "LoraConfig", "tuners.adalora.model tuners.lora.variants"),
    ("peft.tuners.lora.config", "BdLoraConfig MontecloraConfig", "tuners.lora.variants"),
    ("peft.tuners.lora.layer", "dispatch_default", "tuners.lora.model"),
    ("peft.tuners.lora.tp_layer", "dispatch_megatron", "tuners.lora.model"),
    (
        "peft.tuners.lora.quantized",
        "dispatch_aqlm dispatch_awq dispatch_eetq dispatch_gptq dispatch_hqq dispatch_inc dispatch_torchao "
        "dispatch_transformer_engine",
        "tuners.lora.model",
    ),
    (
        "peft.tuners.adaption_prompt.targets",
        "ModelTypeConfig TRANSFORMERS_MODEL_CONFIG prepare_config",
        "tuners.adaption_prompt.config",
    ),
    ("peft.tuners.adaption_prompt.targets", "TRANSFORMERS_MODEL_CONFIG", "tuners.adaption_prompt.layer"),
    ("peft.tuners.adaption_prompt.targets", "prepare_config", "tuners.adaption_prompt.model"),
    (
        "peft.tuners.adaption_prompt.maths",
        "gpt2_compute_query_states llama_compute_query_states",
        "tuners.adaption_prompt.config",
    ),
    ("peft.tuners.adaption_prompt.maths", "is_adaption_prompt_trainable", "tuners.adaption_prompt.model"),
    (
        "peft.tuners.adaption_prompt.layer",
        "AdaptedAttention AdaptedAttentionGPT",
        "tuners.adaption_prompt.model",
    ),
    ("peft.tuners.adalora.quantized", "SVDQuantLinear", "tuners.adalora.model"),
    ("peft.tuners.lora.layer", "Conv1d Conv2d Conv3d Embedding Linear LoraLayer", "tuners.lora.variants"),
    (
        "peft.tuners.lora.variants.dora_layers",
        "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer",
        "tuners.lora.variants tuners.lora.variants.dora",
    ),
    ("peft.utils.tensor_parallel", "add_lora_tp_hooks_dtensor get_tp_plan_and_mesh", "tuners.lora.model"),
    ("peft.utils.tensor_parallel", "LoraEmbeddingATPHolder _LoraParameterProxy", "tuners.lora.layer"),
    ("peft.tuners.lora.model", "LoraModel", "helpers"),
    ("peft.tuners.lora.layer", "Embedding", "optimizers.loraplus"),
    ("peft.models.peft_model", "PeftModel", "optimizers.lorafa optimizers.loraplus optimizers.riemannian"),
    ("peft.utils.devices", "infer_device", "optimizers.lorafa"),
    ("peft.tuners.oft.layer", "Conv2d Embedding Linear OFTLayer", "tuners.oft.model"),
    ("peft.tuners.oft.maths", "MultiplicativeDropoutLayer", "tuners.oft.layer"),
    ("peft.tuners.shira.maths", "random_mask", "tuners.shira.config"),
    ("peft.tuners.vblora.config", "VBLoRAConfig", "tuners.vblora.model"),
    ("peft.tuners.vblora.layer", "Linear VBLoRALayer", "tuners.vblora.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING", "tuners.vblora.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING", "tuners.boft.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING", "tuners.fourierft.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING", "tuners.hra.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING", "tuners.ia3.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING", "tuners.loha.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING", "tuners.lokr.model"),
    ("peft.tuners.base", "BaseTuner", "tuners.ln_tuning.model tuners.vblora.model tuners.vera.model"),
    ("peft.tuners.ln_tuning.layer", "LNTuningLayer", "tuners.ln_tuning.model"),
    ("peft.tuners.vera.layer", "Linear VeraLayer", "tuners.vera.model"),
    ("peft.tuners.vera.config", "VeraConfig", "tuners.vera.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING", "tuners.ln_tuning.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING", "tuners.vera.model"),
    ("peft.utils.constants", "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES", "tuners.lora.layer"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "tuners.mixed.model"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING", "tuners.oft.model"),
    (
        "peft.utils.integrations",
        "gather_params_ctx",
        "tuners.adalora.model tuners.lora.layer tuners.lora.tp_layer tuners.lora.variants",
    ),
    ("peft.utils.devices", "get_device_map", "tuners.adalora.model tuners.lora.model"),
    ("peft.utils.devices", "get_layer_device_map map_cache_to_layer_device_map", "utils.integrations"),
    (
        "peft.utils.old_cache_layouts",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
        "starcoder_model_postprocess_past_key_value",
        "utils.constants",
    ),
    ("peft.utils.quantization_utils", "get_gptqmodel_quant_linear", "tuners.adalora.model"),
    ("peft.utils.tensor_parallel", "TpInfo", "tuners.lora.model utils.integrations"),
    ("peft.utils.tensor_parallel", "dtensor_from_local_like", "utils.integrations"),
    ("peft.anatomy.walking", "find_parameter_name_by_module", "tuners.lora.model"),
    ("peft.utils.integrations", "skip_init_on_device", "tuners.lora.layer"),
    ("peft.utils.merge_utils", "dare_linear dare_ties magnitude_prune task_arithmetic ties", "tuners.lora.model"),
    ("peft.utils.quantization_utils", "get_quantization_config", "tuners.adalora.model tuners.lora.model"),
    (
        "peft.utils.quantization_utils",
        "resolve_quantization_backend",
        "tuners.boft.layer tuners.boft.model tuners.oft.layer tuners.oft.model tuners.vera.layer tuners.vera.model",
    ),
    (
        "peft.utils.quantization_utils",
        "quantization_extra_repr",
        "tuners.boft.layer tuners.oft.layer tuners.vera.layer",
    ),
    (
        "peft.utils.quantization_utils",
        "get_quantization_kwargs",
        "tuners.boft.model tuners.oft.model tuners.vera.model",
    ),
    ("peft.utils.quantization_utils", "get_bnb_param_type", "tuners.lora.layer"),
    (
        "peft.utils.quantization_utils",
        "dequantize_module_weight",
        "tuners.lora.layer tuners.lora.variants tuners.lora.variants.dora",
    ),
    ("peft.utils.warning", "PeftWarning", "tuners.lora.layer"),
)


@lru_cache(maxsize=1)
def _homes() -> dict[tuple[str, str], str]:
    """Index the rows: module and name -> where the name is."""
    return {
        (f"peft.{module}", name): home
        for home, names, modules in _ROWS
        for name in names.split()
        for module in modules.split()
    }


def find_old_name(module: str, name: str) -> Any:
    """
    Find what a module of the released package has under a name that is elsewhere here.

    Args:
        module: full name of the module.
        name: what is asked of it.

    Raises:
        AttributeError: if the module has no such name there either.
    """
    home = _homes().get((module, name))
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    setattr(sys.modules[module], name, value)
    return value


def old_names(module: str) -> Callable[[str], Any]:
    """
    Make the `__getattr__` of a module, through which it gives what it merely used in the released package (PEP 562).

    Args:
        module: `__name__` of the module.
    """

    def __getattr__(name: str) -> Any:
        return find_old_name(module, name)

    return __getattr__
