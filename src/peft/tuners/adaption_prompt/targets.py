# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which attention modules of a model are adapted, and what their projections are called."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ...anatomy.walking import names_of_modules
from ...utils.error import PeftTypeError, PeftValueError
from .config import AdaptionPromptConfig
from .layer import AdaptedAttention, AdaptedAttentionGPT, _BaseAdaptedAttention
from .maths import gpt2_compute_query_states, llama_compute_query_states


class ModelTypeConfig(NamedTuple):
    """
    What the attention modules of a type of models are like.

    Attributes:
        compute_query_states: gives their queries.
        target_modules: what they are called.
        k_proj_layer: name of the projection to keys, or of the one to queries, keys and values.
        v_proj_layer: name of the projection to values, if it is another one.
        o_proj_layer: name of the projection of the output, if there is one that the prompt goes through.
    """

    compute_query_states: Callable[..., Any]
    target_modules: str
    k_proj_layer: str
    v_proj_layer: str | None
    o_proj_layer: str | None


_LLAMA = ModelTypeConfig(llama_compute_query_states, "self_attn", "k_proj", "v_proj", "o_proj")
TRANSFORMERS_MODEL_CONFIG = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": ModelTypeConfig(gpt2_compute_query_states, "attn", "c_attn", None, None),
}
_WRAPPERS = {"gpt2": AdaptedAttentionGPT}


def prepare_config(peft_config: AdaptionPromptConfig, model: nn.Module) -> AdaptionPromptConfig:
    """
    Fill in the name of the attention modules, if it is left out.

    Args:
        peft_config: the config, which is changed.
        model: the base model.

    Returns:
        The config.

    Raises:
        PeftValueError: for models of other types.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in TRANSFORMERS_MODEL_CONFIG:
        known = ", ".join(TRANSFORMERS_MODEL_CONFIG)
        raise PeftValueError(f"adaption prompt works for models of the types {known}, found {model_type!r}")
    if peft_config.target_modules is None:
        peft_config.target_modules = TRANSFORMERS_MODEL_CONFIG[model_type].target_modules
    return peft_config


def wrapper_class(model: nn.Module) -> type[_BaseAdaptedAttention]:
    """
    Give the class that wraps the attention modules of a model.

    Args:
        model: a base model of one of the types that there are.
    """
    return _WRAPPERS.get(model.config.model_type, AdaptedAttention)


def find_targets(model: nn.Module, config: AdaptionPromptConfig) -> list[nn.Module]:
    """
    Find the attention modules that a config adapts, those that have a wrapper already with it.

    Args:
        model: the base model.
        config: a config that is prepared.

    Raises:
        PeftTypeError: if a number is left out.
        PeftValueError: if a number is no positive one, or nothing fits.
    """
    for name in ("adapter_len", "adapter_layers"):
        value = getattr(config, name)
        if value is None:
            raise PeftTypeError(f"adaption prompt needs {name}, a positive number")
        if value < 1:
            raise PeftValueError(f"{name} must be a positive number, found {value}")
    if not isinstance(config.target_modules, str):
        raise PeftValueError(f"target_modules of adaption prompt is one name, found {config.target_modules!r}")
    ending = f".{config.target_modules}"
    found = [(name, module) for name, module in names_of_modules(model).items() if name.endswith(ending)]
    if not found:
        raise PeftValueError(f"no module of {type(model).__name__} is named {config.target_modules!r}")
    if config.adapter_layers > len(found):
        raise PeftValueError(
            f"adapter_layers={config.adapter_layers}, but the model has {len(found)} modules named "
            f"{config.target_modules!r}"
        )
    targets = found[-config.adapter_layers :]
    needed = wrapper_class(model).projections
    for name, module in targets:
        attention = module.model if isinstance(module, _BaseAdaptedAttention) else module
        missing = [key for key in needed if not isinstance(getattr(attention, key, None), nn.Module)]
        if missing:
            raise PeftValueError(f"{name} is no attention module that can be adapted: it has no {', '.join(missing)}")
    return [module for _, module in targets]


def prepared_copy(config: AdaptionPromptConfig, model: nn.Module) -> AdaptionPromptConfig:
    """
    Copy a config, as it applies to a model.

    Args:
        config: a config, which is not changed.
        model: the base model.
    """
    return prepare_config(copy.copy(config), model)
