# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Layouts of keys and values that models of transformers had before its `Cache` classes.

Prefix tuning fills the cache of whatever transformers is installed (`prompts/computing.py`) and needs none of this; it
is for callers who have a prefix in the old form, of which this is the order of release 0.21.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .optional_packages import is_transformers_le_4_53


def bloom_model_postprocess_past_key_value(
    past_key_values: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """
    Bring a prefix into the old layout of BLOOM.

    Args:
        past_key_values: one tensor (2, batch, heads, tokens, head_dim) per layer.

    Returns:
        Per layer the keys (batch * heads, head_dim, tokens) and the values (batch * heads, tokens, head_dim). The
        first half of all slices are keys, whose rows are read token by token: adapters are trained like that.

    Example:

        >>> import torch
        >>> from peft import bloom_model_postprocess_past_key_value
        >>> keys, values = bloom_model_postprocess_past_key_value([torch.zeros(2, 1, 4, 3, 5)])[0]
        >>> keys.shape, values.shape
        (torch.Size([4, 5, 3]), torch.Size([4, 3, 5]))
    """
    slices = torch.cat(tuple(past_key_values))
    count, batch, heads, tokens, width = slices.shape
    keys, values = slices[: count // 2], slices[count // 2 :]
    keys = keys.transpose(2, 3).reshape(-1, batch * heads, width, tokens)
    return tuple(zip(keys, values.reshape(-1, batch * heads, tokens, width), strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """
    Bring a prefix into the old layout of GPT BigCode, whose queries share one head of keys and values.

    Args:
        past_key_values: one tensor (2, batch, heads, tokens, head_dim) per layer; the first head counts.

    Returns:
        Per layer (batch, tokens, 2 * head_dim), keys and values side by side.
    """
    return tuple(torch.cat((keys[:, 0], values[:, 0]), dim=-1) for keys, values in past_key_values)


# type of model -> function, for models that the installed transformers has in their old form
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[..., Any]] = (
    {"gpt_bigcode": starcoder_model_postprocess_past_key_value} if is_transformers_le_4_53 else {}
)
