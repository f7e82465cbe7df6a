# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Prefixes that start from the cache of a text, instead of random keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...registry import PeftType
from ...utils.caches import given_cache
from ...utils.error import PeftTypeError, PeftValueError


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """
    Turn the first positions of a cache into the table of a prefix.

    Args:
        past_key_values: cache of one sample: an object of transformers, or (key, value) for each layer, both of shape
            (1, heads, length, width of a head).
        num_virtual_tokens: how many positions to take.

    Returns:
        (tokens, layers * 2 * heads * width): key and value of the first layer, of the second one, and so on.

    Raises:
        PeftTypeError: if that is no cache.
        PeftValueError: if its tensors have other shapes, or there are fewer positions.

    Example:

        >>> import torch
        >>> from peft import prompt_embeddings_from_past_key_values
        >>> cache = [(torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5, 4)) for _ in range(3)]
        >>> prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4).shape
        torch.Size([4, 48])
    """
    if num_virtual_tokens < 1:
        raise PeftValueError(f"num_virtual_tokens must be a positive number, found {num_virtual_tokens}")
    tensors = [tensor for pair in _layers(past_key_values) for tensor in pair]
    if not tensors:
        raise PeftValueError("past_key_values holds no layers; run the model with use_cache=True first")
    first = tensors[0]
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if len(shape) != 4 or shape[0] != 1:
            raise PeftValueError(f"past_key_values must hold tensors (1, heads, length, width), found one of {shape}")
        if shape[2] < num_virtual_tokens:
            raise PeftValueError(
                f"past_key_values holds {shape[2]} positions, which is less than num_virtual_tokens="
                f"{num_virtual_tokens}; use a longer text or fewer virtual tokens"
            )
        if (shape[1], shape[3]) != (first.shape[1], first.shape[3]):
            raise PeftValueError(
                "layers of past_key_values differ in heads or their width, so that no one table can hold them: "
                f"{tuple(first.shape)}, {shape}"
            )
    rows = [tensor[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for tensor in tensors]
    return torch.cat([row.to(first) for row in rows], dim=1)


def _layers(cache: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield key and value of each layer of a cache, of whatever kind it is."""
    if hasattr(cache, "to_legacy_cache"):
        cache = cache.to_legacy_cache()
    if not isinstance(cache, Iterable):
        raise PeftTypeError(f"past_key_values is a {type(cache).__name__}, which is no cache that is read by layers")
    for layer in cache:
        pair = tuple(layer)[:2] if isinstance(layer, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(tensor, torch.Tensor) for tensor in pair):
            found = type(layer).__name__
            raise PeftTypeError(f"past_key_values must give (key, value) for each layer, found a {found}")
        yield pair


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """
    Let a cartridge, or a prefix without a network, start from a cache.

    Args:
        model: a `PeftModel` with it.
        adapter_name: its name; the active adapter if left out.
        past_key_values: see `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: that of the adapter's config, which is taken if it is left out.

    Returns:
        (tokens, layers * 2 * token_dim) the keys and values that it starts from.

    Raises:
        PeftValueError: for another method, a prefix with a network, another number of tokens, or a cache that does
            not fit.
        PeftTypeError: if `past_key_values` is no cache.
    """
    name, tokens = _check_prefix(model, adapter_name, num_virtual_tokens)
    start = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    model.prompt_encoder[name].load_prompt_embeddings(start)
    return start


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """
    Let a cartridge, or a prefix without a network, start from what the base model caches for a text.

    Args:
        model: a `PeftModel` with it.
        tokenizer: the base model's.
        text: a text of at least as many tokens as the prefix has.
        adapter_name: name of the adapter; the active one if left out.
        num_virtual_tokens: that of the adapter's config, which is taken if it is left out.
        use_chat_template: give the text to the model as a system message, if the tokenizer has a template for it.
        max_length: how many tokens of the text are used; all if left out.

    Returns:
        (tokens, layers * 2 * token_dim) the keys and values that it starts from.

    Raises:
        PeftValueError: for another method, a prefix with a network, another number of tokens, or a short text.
    """
    name, tokens = _check_prefix(model, adapter_name, num_virtual_tokens)
    base = model.get_base_model()
    device = model.prompt_encoder.base_weight.device
    ids = _token_ids(tokenizer, text, use_chat_template, max_length).to(device)
    with model.disable_adapter(), _evaluating(base):
        outputs = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=given_cache(outputs), num_virtual_tokens=tokens
    )


def _check_prefix(model: nn.Module, adapter_name: str | None, tokens: int | None) -> tuple[str, int]:
    """Refuse what is no prefix; give the name of the adapter and its number of tokens."""
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise PeftValueError(f"there is no adapter {name!r}; the model has {', '.join(model.peft_config)}")
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise PeftValueError(f"only CARTRIDGE and PREFIX_TUNING start from a cache, found {config.peft_type.value}")
    if getattr(config, "prefix_projection", False):
        raise PeftValueError("with prefix_projection=True a network computes the prefix; it cannot start from a cache")
    if tokens not in (None, config.num_virtual_tokens):
        raise PeftValueError(
            f"adapter {name!r} has num_virtual_tokens={config.num_virtual_tokens}, found {tokens}; leave it out"
        )
    return name, config.num_virtual_tokens


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> torch.Tensor:
    """Tokenize a text, as a system message if the tokenizer has a template for one; (1, length)."""
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        message = [{"role": "system", "content": text}]
        options = {"tokenize": True, "add_generation_prompt": False, "return_dict": False, "return_tensors": "pt"}
        try:
            return tokenizer.apply_chat_template(message, **options)[:, :max_length]
        except (TypeError, ValueError):  # no template, or none for system messages
            pass
    options = {"truncation": max_length is not None, "max_length": max_length}
    return tokenizer(text, return_tensors="pt", **options)["input_ids"]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
