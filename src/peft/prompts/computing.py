# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Computing what the active adapter puts in front of inputs: virtual tokens, or keys and values."""

from typing import Any

import torch

from ..utils.error import PeftValueError
from .learning import PromptEncoders
from .sizes import layers_for_prefix


def compute_prompt(prompts: PromptEncoders, batch_size: int, task_ids: torch.Tensor | None = None) -> Any:
    """
    Compute what the active adapter puts in front of inputs.

    Args:
        prompts: the prompts of the model.
        batch_size: number of samples.
        task_ids: (batch,) for methods with several tasks. If samples come several times in a row, as with beams,
            one id for all of them will do.

    Returns:
        (batch, tokens, width) virtual tokens, or a cache that holds keys and values.
    """
    encoder = prompts.active_encoder
    if encoder.fills_cache:
        return fill_cache(prompts, None, batch_size)
    indices = encoder.indices()
    if not encoder.needs_task_ids:
        return encoder(indices.unsqueeze(0)).expand(batch_size, -1, -1)
    if task_ids is not None:
        task_ids = task_ids.to(indices.device)
        if len(task_ids) == 0 or batch_size % len(task_ids):
            raise PeftValueError(f"task_ids has {len(task_ids)} entries for a batch of {batch_size}; give one each")
        task_ids = task_ids.repeat_interleave(batch_size // len(task_ids))
    return encoder(indices.expand(batch_size, -1), task_ids)


def fill_cache(prompts: PromptEncoders, cache: Any, batch_size: int) -> Any:
    """
    Put keys and values of the active prompt into a cache.

    Args:
        prompts: the prompts of the model, of which the active one is a prefix.
        cache: an empty one; a new one is made if it is None.
        batch_size: number of samples.

    Returns:
        The cache.

    Raises:
        PeftValueError: if the keys of a layer are larger than those of the prefix.
    """
    encoder, config, weight = prompts.active_encoder, prompts.active_config, prompts.base_weight
    if cache is None:
        # not when the package is imported: it takes seconds where a library for quantised caches is installed
        from transformers import DynamicCache, EncoderDecoderCache

        cache = DynamicCache()
        if getattr(prompts.base_model.config, "is_encoder_decoder", False):
            cache = EncoderDecoderCache(cache, DynamicCache())
    table = encoder(encoder.indices().unsqueeze(0))[0]
    if weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
        table = table.to(weight.dtype)
    tokens, heads = len(table), config.num_attention_heads
    # (layers * 2, batch, heads, tokens, width of a head): keys and values of a layer follow each other
    parts = table.view(tokens, config.num_layers * 2, 1, heads, config.token_dim // heads)
    parts = parts.permute(1, 2, 3, 0, 4).expand(-1, batch_size, -1, -1, -1)
    decoder_cache = getattr(cache, "self_attention_cache", cache)
    places = layers_for_prefix(getattr(prompts.base_model, "config", None), config)
    for layer, (layer_heads, layer_width) in places.items():
        # In checkpoints of encoder-decoder models every second pair was meant for cross attention. Keys and values
        # of that come from the source alone, so these pairs are left out, and the count begins again at the end.
        first = 2 * config.num_transformer_submodules * layer % len(parts)
        keys, values = (part[:, :layer_heads, :, :layer_width] for part in (parts[first], parts[first + 1]))
        decoder_cache.update(keys, values, layer)
    return cache
