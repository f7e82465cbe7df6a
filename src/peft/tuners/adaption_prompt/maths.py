# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The queries of attention modules, computed from what the modules get."""

from typing import Any

import torch
from torch import nn

from ...utils.error import PeftValueError


def llama_rotate_half(x: torch.Tensor) -> torch.Tensor:
    """
    Give the second half of features, negated, and then the first half.

    Args:
        x: (..., features).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def llama_apply_rotary_pos_emb(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """
    Rotate queries by tables of all positions.

    Args:
        q: (batch, heads, length, width of a head).
        cos: (..., positions, width of a head).
        sin: likewise.
        position_ids: (batch, length).
    """
    cos, sin = (table.reshape(-1, table.shape[-1])[position_ids] for table in (cos, sin))
    return _rotated(q, cos, sin)


def llama_compute_query_states(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """
    Compute the queries of an attention module as LLaMA and Mistral have it, rotated.

    Args:
        model: the attention module.
        kwargs: what it is called with; `hidden_states` and `position_embeddings` are used.

    Returns:
        (batch, heads, length, width of a head).
    """
    queries = split_heads(model.q_proj(kwargs["hidden_states"]), model.head_dim)
    return _rotated(queries, *kwargs["position_embeddings"])


def gpt2_compute_query_states(
    model: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Compute the queries of an attention module as GPT-2 has it.

    Args:
        model: the attention module.
        hidden_states: (batch, length, width).
        encoder_hidden_states: given if the module attends to an encoder.

    Returns:
        (batch, heads, length, width of a head).

    Raises:
        PeftValueError: if it is given for a module without queries of cross attention.
    """
    if encoder_hidden_states is None:
        queries = model.c_attn(hidden_states).chunk(3, dim=-1)[0]
    elif hasattr(model, "q_attn"):
        queries = model.q_attn(hidden_states)
    else:
        raise PeftValueError(
            "encoder_hidden_states is given, but the attention module has no q_attn for cross attention"
        )
    return split_heads(queries, model.head_dim)


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """
    Cut features into heads.

    Args:
        x: (batch, length, heads * width of a head).
        head_dim: width of a head.

    Returns:
        (batch, heads, length, width of a head).
    """
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotated(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries by what belongs to their positions, (batch, length, width of a head)."""
    return q * cos.unsqueeze(1) + llama_rotate_half(q) * sin.unsqueeze(1)


def is_adaption_prompt_trainable(params: str) -> bool:
    """
    Say whether a parameter belongs to an adapter of this method.

    Args:
        params: its full name.
    """
    return params.rpartition(".")[2].startswith("adaption_")
