# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The sizes that a config of prompt learning leaves to the base model."""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ..config import PromptLearningConfig
from ..registry import PEFT_TYPE_TO_TUNER_MAPPING, TaskType
from ..utils.error import PeftKeyError, PeftValueError
from ..utils.warning import warn


# what a size is called in the configs of models
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
_DECODER_HEADS = ("decoder_attention_heads",)
_KEY_HEADS = ("num_key_value_heads",)
_HEAD_WIDTH = ("head_dim", "d_kv")
_SHARED_LAYERS = ("num_kv_shared_layers",)  # the last ones, which use the keys and values of earlier layers


def complete_config(config: PromptLearningConfig, model: Any) -> PromptLearningConfig:
    """
    Copy a config and fill in the sizes that it leaves to the base model.

    Args:
        config: a config of prompt learning.
        model: the base model; its `config` is read.

    Raises:
        PeftKeyError: if there is no task type.
        PeftValueError: if a size is not given, and not told by the model either, or if sizes contradict each other.
    """
    config = copy.copy(config)
    if config.task_type is None:
        raise PeftKeyError("prompt learning needs task_type, which says what the inputs of the model are")
    if not config.num_virtual_tokens:
        raise PeftValueError(f"num_virtual_tokens must be a positive number, found {config.num_virtual_tokens!r}")
    fills_cache = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].fills_cache
    model_config = getattr(model, "config", None)
    if _size(model_config, _WIDTH) is None and hasattr(model_config, "get_text_config"):  # multimodal models
        model_config = model_config.get_text_config()
    decoder = fills_cache and getattr(model_config, "is_encoder_decoder", False)
    sizes = {
        "num_layers": _size(model_config, (_DECODER_LAYERS if decoder else ()) + _LAYERS),
        "num_attention_heads": _size(model_config, (_DECODER_HEADS if decoder else ()) + _HEADS),
        "token_dim": _size(model_config, _WIDTH),
        "num_transformer_submodules": 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1,
    }
    if fills_cache and sizes["num_attention_heads"]:  # keys may have fewer heads, and another width than the model
        head_width = _size(model_config, _HEAD_WIDTH) or (sizes["token_dim"] or 0) // sizes["num_attention_heads"]
        sizes["num_attention_heads"] = _size(model_config, _KEY_HEADS) or sizes["num_attention_heads"]
        sizes["token_dim"] = head_width * sizes["num_attention_heads"]
    for name, size in sizes.items():
        if getattr(config, name) is None:
            setattr(config, name, size)
    needed = ["token_dim", *(["num_layers", "num_attention_heads"] if fills_cache else [])]
    missing = [name for name in needed if not getattr(config, name)]
    if missing:
        raise PeftValueError(f"the model's config does not tell {', '.join(missing)}; set it in the adapter's config")
    if fills_cache and config.token_dim % config.num_attention_heads:
        raise PeftValueError(
            f"token_dim={config.token_dim} cannot be divided among num_attention_heads={config.num_attention_heads}; "
            "leave both out of the config, then the model tells them"
        )
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim
    return config


def _prepare_prompt_learning_config(
    peft_config: PromptLearningConfig, model_config: Mapping[str, Any]
) -> PromptLearningConfig:
    """
    Fill in the sizes that a config leaves to the base model, in the config itself.

    Args:
        peft_config: a config of prompt learning, which is changed.
        model_config: the fields of the base model's config.

    Returns:
        The config.

    Raises:
        PeftValueError: if a size is not given, and not told by the model either.
    """
    inner = model_config.get("text_config")
    told = SimpleNamespace(**{**(inner if isinstance(inner, Mapping) else {}), **model_config})
    peft_config.__dict__.update(complete_config(peft_config, SimpleNamespace(config=told)).__dict__)
    return peft_config


def layers_for_prefix(model_config: Any, config: PromptLearningConfig) -> dict[int, tuple[int, int]]:
    """
    Find the layers that a prefix is put into; it is cut to the size of their keys.

    Where layers use keys and values of others (Gemma 4), there is one warning that names those that are left out.

    Args:
        model_config: the base model's config.
        config: a complete config of prefix tuning.

    Returns:
        Number of a layer -> how many heads its keys have, and how wide these are.

    Raises:
        PeftValueError: if the keys of a layer are larger than those of the prefix.
    """
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    shared = _size(model_config, _SHARED_LAYERS) or 0
    if not shared and not _differs_by_layer(model_config):
        return dict.fromkeys(range(config.num_layers), (heads, width))
    sizes = [_size_of_keys(layer) for layer in _layer_configs(model_config, config.num_layers)]
    places = dict(enumerate(sizes[: len(sizes) - shared]))
    if any(layer_heads > heads or layer_width > width for layer_heads, layer_width in places.values()):
        raise PeftValueError(
            f"the prefix has keys of num_attention_heads={heads} heads and width {width}, which do not fit the layers "
            f"of the model; these have (heads, width) {sorted(set(places.values()))}. Leave token_dim and "
            "num_attention_heads out of the config, then the model tells them"
        )
    if shared:
        left_out = list(range(len(places), len(sizes)))
        warn(
            f"the prefix is put into layers {list(places)}, and not into layers {left_out}, which use the keys and "
            "values of other layers"
        )
    return places


def _size_of_keys(model_config: Any) -> tuple[int, int]:
    """Read how many heads keys have, and how wide these are."""
    heads = _size(model_config, _HEADS) or 1
    width = _size(model_config, _HEAD_WIDTH) or (_size(model_config, _WIDTH) or 0) // heads
    return _size(model_config, _KEY_HEADS) or heads, width


def _differs_by_layer(model_config: Any) -> bool:
    """Say whether the layers of a model have configs of their own; the model's then refuses to tell some sizes."""
    return getattr(model_config, "is_heterogeneous", False) is True


def _layer_configs(model_config: Any, layers: int = 1) -> list[Any]:
    """Give a config for each layer, as many as asked for where they do not differ."""
    return list(model_config.per_layer_config) if _differs_by_layer(model_config) else [model_config] * layers


def _size(model_config: Any, names: Sequence[str]) -> int | None:
    """Read the first of several fields that a model's config has; the largest where layers differ in it."""
    layers = _layer_configs(model_config)
    found = ([getattr(layer, name, None) for layer in layers] for name in names)
    return next((max(sizes) for sizes in found if all(isinstance(size, int) and size for size in sizes)), None)
