# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the inputs of a model of transformers say, and the masks that are made for them."""

import inspect
from typing import Any

import torch
from torch import nn

from .caches import CACHE_NAMES
from .error import PeftValueError


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """
    Read the number of samples.

    Args:
        input_ids: (batch, tokens).
        inputs_embeds: (batch, tokens, width), used if there are no ids.

    Raises:
        PeftValueError: if there is neither.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise PeftValueError("neither input_ids nor inputs_embeds was given, and one of them says the batch size")
    return given.shape[0]


def create_attention_mask(
    model: nn.Module,
    *,
    model_input: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: torch.Tensor | None,
) -> Any:
    """
    Ask transformers for the mask that a model applies to the scores of its attention.

    Args:
        model: a model of transformers.
        model_input: ids or embeddings, if there are any; they say the device.
        attention_mask: (batch, tokens), with those in the cache; None if all count. A mask that is made already, of
            four dimensions, is given back.
        past_key_values: the cache, or None.
        cache_position: places of the tokens in the cache, for versions of transformers that ask for them.
        batch_size: number of samples.
        sequence_length: number of tokens that are computed, virtual ones among them.
        position_ids: (batch, tokens), or None.

    Returns:
        What the model takes as `attention_mask`: a tensor, one per kind of layer, or None if no mask is needed.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    from transformers import masking_utils

    create = getattr(model, "create_masks_for_generate", masking_utils.create_masks_for_generate)
    device = next((given.device for given in (model_input, attention_mask, cache_position) if given is not None), None)
    # read for its sizes, type and device only
    embeddings = torch.empty((batch_size, sequence_length, 1), dtype=model.dtype, device=device or model.device)
    given = {
        "config": model.config,
        "inputs_embeds": embeddings,
        "input_embeds": embeddings,
        "attention_mask": attention_mask,
        "cache_position": cache_position,
        "position_ids": position_ids,
        **dict.fromkeys(CACHE_NAMES, past_key_values),
    }
    parameters = inspect.signature(create).parameters
    return create(**{name: value for name, value in given.items() if name in parameters})
