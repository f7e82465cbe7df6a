# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Names that release 0.21.2 lets one import from a module which only uses them, so that such imports go on to work.

A file that is nothing but an old path is a table of names itself (`lazy.py`); these are modules that hold code. A
module takes part with a line at its end: `__getattr__ = old_names(__name__)`. Packages with a table take part by it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any


# where names are, the names, and which module of each method's package gives them too
_OF_METHODS: tuple[tuple[str, str, str], ...] = (
    ("peft.registry", "PeftType register_peft_method", "__init__"),
    ("peft.config", "PeftConfig", "config model"),
    ("peft.registry", "PeftType", "config model"),
    ("peft.anatomy.kinds", "transpose", "layer"),
    ("peft.layers.base_layer", "BaseTunerLayer", "layer model"),
    ("peft.layers.buffer_dict", "BufferDict", "layer model"),
    ("peft.layers.merging.checks", "check_adapters_to_merge", "layer"),
    ("peft.utils.integrations", "gather_params_ctx", "layer model"),
    ("peft.utils.quantization_utils", "quantization_extra_repr", "layer"),
    ("peft.utils.quantization_utils", "resolve_quantization_backend", "layer model"),
    ("peft.utils.quantization_utils", "get_quantization_kwargs", "model"),
    ("peft.anatomy.matching", "check_target_module_exists get_pattern_key", "model"),
    ("peft.tuners.base", "BaseTuner", "model"),
    ("peft.tuners.lora.layer", "dispatch_default", "layer model"),
    ("peft.utils.devices", "get_device_map", "model"),
)

# module of a method's package -> its neighbours, of which it gives all that they have
_NEIGHBOURS = {"layer": ("config", "maths"), "model": ("layer", "config")}

# where the names are, the names, and the modules of this package that give them too
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("peft.anatomy.kinds", "transpose", "tuners.lora.tp_layer tuners.lora.variants tuners.lora.variants.dora"),
    ("peft.anatomy.walking", "find_parameter_name_by_module", "tuners.lora.model"),
    ("peft.checkpoints.state_dict", "get_peft_model_state_dict", "tuners.lora.model"),
    ("peft.config", "PromptLearningConfig", "mapping_func"),
    ("peft.config", "PeftConfig", "tuners.lora.variants"),
    ("peft.layers.buffer_dict", "BufferDict", "tuners.lora.variants"),
    ("peft.layers.merging.checks", "check_adapters_to_merge", "tuners.lora.tp_layer"),
    (
        "peft.layers.modules_to_save",
        "ModulesToSaveWrapper",
        "tuners.ia3.model tuners.lora.conversion tuners.lora.model tuners.mixed.model",
    ),
    ("peft.layers.training_wrapper", "AuxiliaryTrainingWrapper", "tuners.lora.model"),
    ("peft.models.peft_model", "PeftModel", "optimizers.lorafa optimizers.loraplus optimizers.riemannian"),
    ("peft.registry", "TaskType", "tuners.multitask_prompt_tuning.model"),
    ("peft.tuners", "adalora loha lokr lora oft shira", "tuners.mixed.model"),
    ("peft.tuners.adalora.quantized", "SVDQuantLinear", "tuners.adalora.model"),
    (
        "peft.tuners.adaption_prompt.maths",
        "gpt2_compute_query_states llama_compute_query_states",
        "tuners.adaption_prompt.config",
    ),
    ("peft.tuners.adaption_prompt.maths", "is_adaption_prompt_trainable", "tuners.adaption_prompt.model"),
    (
        "peft.tuners.adaption_prompt.targets",
        "ModelTypeConfig TRANSFORMERS_MODEL_CONFIG prepare_config",
        "tuners.adaption_prompt.config",
    ),
    ("peft.tuners.adaption_prompt.targets", "TRANSFORMERS_MODEL_CONFIG", "tuners.adaption_prompt.layer"),
    ("peft.tuners.adaption_prompt.targets", "prepare_config", "tuners.adaption_prompt.model"),
    ("peft.tuners.families.lycoris", "LycorisConfig LycorisTuner", "tuners.loha.model tuners.lokr.model"),
    ("peft.tuners.lora.config", "LoraConfig", "tuners.adalora.model"),
    ("peft.tuners.lora.config", "LoraConfig BdLoraConfig MontecloraConfig", "tuners.lora.variants"),
    ("peft.tuners.lora.layer", "Embedding", "optimizers.loraplus"),
    ("peft.tuners.lora.layer", "Conv1d Conv2d Conv3d Embedding Linear LoraLayer", "tuners.lora.variants"),
    ("peft.tuners.lora.model", "LoraModel", "helpers"),
    ("peft.tuners", "lora", "tuners.xlora.layer tuners.xlora.model"),
    ("peft.checkpoints.state_dict", "set_peft_model_state_dict", "tuners.xlora.model"),
    ("peft.utils.constants", "DUMMY_TARGET_MODULES", "tuners.xlora.model"),
    ("peft.tuners.lora.tp_layer", "dispatch_megatron", "tuners.lora.model"),
    (
        "peft.tuners.lora.quantized",
        "dispatch_aqlm dispatch_awq dispatch_eetq dispatch_gptq dispatch_hqq dispatch_inc dispatch_torchao "
        "dispatch_transformer_engine",
        "tuners.lora.model",
    ),
    (
        "peft.tuners.lora.variants.dora_layers",
        "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer",
        "tuners.lora.variants tuners.lora.variants.dora",
    ),
    ("peft.tuners.shira.maths", "random_mask", "tuners.shira.config"),
    ("peft.utils.constants", "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES", "tuners.lora.layer"),
    ("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "tuners.mixed.model"),
    ("peft.utils.constants", "SAFETENSORS_WEIGHTS_NAME", "tuners.lora.conversion"),
    ("peft.utils.devices", "infer_device", "optimizers.lorafa"),
    ("peft.utils.devices", "get_layer_device_map map_cache_to_layer_device_map", "utils.integrations"),
    ("peft.utils.integrations", "skip_init_on_device", "tuners.lora.layer"),
    ("peft.utils.integrations", "gather_params_ctx", "tuners.lora.tp_layer tuners.lora.variants"),
    ("peft.utils.merge_utils", "dare_linear dare_ties magnitude_prune task_arithmetic ties", "tuners.lora.model"),
    (
        "peft.utils.old_cache_layouts",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
        "starcoder_model_postprocess_past_key_value",
        "utils.constants",
    ),
    ("peft.utils.quantization_utils", "get_gptqmodel_quant_linear get_quantization_config", "tuners.adalora.model"),
    ("peft.utils.quantization_utils", "get_bnb_param_type dequantize_module_weight", "tuners.lora.layer"),
    ("peft.utils.quantization_utils", "get_quantization_config", "tuners.lora.model"),
    ("peft.utils.quantization_utils", "dequantize_module_weight", "tuners.lora.variants tuners.lora.variants.dora"),
    ("peft.utils.tensor_parallel", "LoraEmbeddingATPHolder _LoraParameterProxy", "tuners.lora.layer"),
    ("peft.utils.tensor_parallel", "add_lora_tp_hooks_dtensor get_tp_plan_and_mesh TpInfo", "tuners.lora.model"),
    ("peft.utils.tensor_parallel", "TpInfo dtensor_from_local_like", "utils.integrations"),
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


@lru_cache(maxsize=1)
def _homes_of_methods() -> dict[tuple[str, str], str]:
    """Index the rows of methods: last part of a module's name and name -> where the name is."""
    return {
        (kind, name): home for home, names, kinds in _OF_METHODS for name in names.split() for kind in kinds.split()
    }


def _find_in_method(module: str, name: str) -> Any:
    """Find what any module of a method gives; None if it is no such module or has no such name."""
    folder, _, kind = (module if module.count(".") > 2 else f"{module}.__init__").rpartition(".")
    if not folder.startswith("peft.tuners.") or name.startswith("_"):
        return None
    home = _homes_of_methods().get((kind, name))
    if home is not None:
        return getattr(importlib.import_module(home), name)
    for neighbour in _NEIGHBOURS.get(kind, ()):
        if importlib.util.find_spec(f"{folder}.{neighbour}") is not None:
            found = vars(importlib.import_module(f"{folder}.{neighbour}")).get(name)
            if found is not None:
                return found
    return None


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
    value = _find_in_method(module, name) if home is None else getattr(importlib.import_module(home), name)
    if value is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
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
