# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The kinds of base layers, each with the one thing that differs: how it uses its weight."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


def stores_weight_transposed(layer: nn.Module) -> bool:
    """Say whether a layer keeps its weight as (in, out), as transformers' `Conv1D` does."""
    return isinstance(layer, Conv1D)


def has_outputs_last(layer: nn.Module) -> bool:
    """Say whether the last dimension of a layer's weight counts output features: `Conv1D` and embeddings."""
    return isinstance(layer, (Conv1D, nn.Embedding))


def features(layer: nn.Module) -> tuple[int, int]:
    """
    Give the numbers of input and output features of a layer.

    Args:
        layer: `nn.Linear`, `nn.Embedding` (inputs are token ids, so the vocabulary counts) or `Conv1D`.
    """
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        # ZeRO-3 replaces partitioned weights by empty ones and keeps the shape in ds_shape
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return shape[0], shape[1]
    return layer.in_features, layer.out_features


def embed(layer: nn.Embedding, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    Look rows up as an embedding layer would, in another matrix.

    Args:
        layer: supplies padding index, norm limit and scale (Gemma multiplies its embeddings by a constant).
        ids: token ids, any shape.
        weight: (num_embeddings, width).
    """
    rows = F.embedding(
        ids,
        weight,
        padding_idx=layer.padding_idx,
        max_norm=layer.max_norm,
        norm_type=layer.norm_type,
        scale_grad_by_freq=layer.scale_grad_by_freq,
        sparse=layer.sparse,
    )
    scale = getattr(layer, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows.dtype)


def apply_weight(
    layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Compute what a base layer would, with another weight.

    Args:
        layer: the base layer, of any supported kind.
        x: its input.
        weight: a weight of the same shape and layout as the layer's own.
        bias: (out_features,) or None.
    """
    if isinstance(layer, nn.Embedding):
        return embed(layer, x, weight)
    if stores_weight_transposed(layer):
        weight = weight.T
    return F.linear(x, weight, bias)
