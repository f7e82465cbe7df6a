# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The kinds of base layers, each with the one thing that differs: how it uses its weight."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.quantization_utils import resolve_quantization_backend


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# dimensions of space -> function that convolves
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_quantized_linear(layer: nn.Module) -> bool:
    """Say whether a layer is linear and quantised, be it of a class of torch or not."""
    return not isinstance(layer, (nn.Embedding, *CONVOLUTIONS)) and resolve_quantization_backend(layer) is not None


def is_linear(layer: nn.Module) -> bool:
    """Say whether a layer is linear, quantised or not."""
    return isinstance(layer, (nn.Linear, Conv1D)) or is_quantized_linear(layer)


def is_plain(layer: nn.Module) -> bool:
    """
    Say whether a layer is linear, computes what its weight and bias tell, and nobody listens.

    Args:
        layer: any layer.
    """
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )


def gives_features(layer: nn.Module) -> bool:
    """
    Say whether a linear layer gives what linear layers do: one tensor, of its output features.

    Routers of some models derive from `nn.Linear` and choose among experts as well. A layer whose class has a forward
    pass of its own is tried on the meta device, which computes nothing; one that cannot be tried is believed.

    Args:
        layer: any layer.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward or is_quantized_linear(layer):
        return True
    trial = copy.copy(layer)
    trial.__dict__["_parameters"] = {
        name: None if parameter is None else nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, parameter in layer._parameters.items()
    }
    trial.training = False
    x = torch.empty(1, 2, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        with torch.no_grad():
            output = trial.forward(x)
    except Exception:  # whatever a layer that somebody else wrote may raise without values
        return True
    return isinstance(output, torch.Tensor) and output.shape[-1:] == (layer.out_features,)


def can_use_weight(layer: nn.Module) -> bool:
    """Say whether `apply_weight` can compute this kind of layer."""
    return is_linear(layer) or isinstance(layer, (nn.Embedding, *CONVOLUTIONS))


def stores_weight_transposed(layer: nn.Module) -> bool:
    """Say whether a layer keeps its weight as (in, out), as transformers' `Conv1D` does."""
    return isinstance(layer, Conv1D)


def has_outputs_last(layer: nn.Module) -> bool:
    """Say whether the last dimension of a layer's weight counts output features: `Conv1D` and embeddings."""
    return isinstance(layer, (Conv1D, nn.Embedding))


def feature_axis(layer: nn.Module, of_input: bool) -> int:
    """Give the axis of a layer's weight along which input (or output) features are counted."""
    return int(of_input != has_outputs_last(layer))


def features(layer: nn.Module) -> tuple[int | None, int | None]:
    """
    Give the numbers of input and output features of a layer.

    Args:
        layer: `nn.Linear`, `nn.Embedding` (inputs are token ids, so the vocabulary counts), `Conv1D`, a convolution
            (its channels), or any other layer, for which they are None unless it says them.
    """
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        # ZeRO-3 replaces partitioned weights by empty ones and keeps the shape in ds_shape
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return shape[0], shape[1]
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    backend = resolve_quantization_backend(layer)
    if backend is not None:
        return backend.features(layer)
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


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
    return scale_rows(layer, rows)


def scale_rows(layer: nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    """Multiply looked-up rows by the constant that some embeddings have."""
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
    if isinstance(layer, CONVOLUTIONS):
        return layer._conv_forward(x, weight, bias)
    if stores_weight_transposed(layer):
        weight = weight.T
    return F.linear(x, weight, bias)


def convolve(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """
    Convolve with another weight as a layer would: with its stride, dilation and padding of whatever mode.

    Args:
        layer: the layer.
        x: its input, (..., in_channels, *space).
        weight: (channels, in_channels / groups, *kernel), the kernel as large as the layer's.
        groups: groups of channels that do not mix.
    """
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    convolution = CONVOLVE[len(layer.kernel_size)]
    return convolution(x, weight, None, layer.stride, padding, layer.dilation, groups)


def along_features(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """
    Shape one value per feature so that it multiplies a layer's inputs or outputs.

    Args:
        layer: the base layer; convolutions have their channels before the dimensions of space.
        values: (features,)
    """
    if isinstance(layer, CONVOLUTIONS):
        return values.view(-1, *[1] * len(layer.kernel_size))
    return values


def along_axis(layer: nn.Module, values: torch.Tensor, axis: int) -> torch.Tensor:
    """
    Shape one value per feature so that it multiplies a layer's weight.

    Args:
        layer: the base layer. A grouped convolution has only the inputs of one group along axis 1 of its weight.
        values: (features,)
        axis: axis of the weight that counts these features.
    """
    shape = [1] * (2 + len(getattr(layer, "kernel_size", ())))
    groups = getattr(layer, "groups", 1)
    if axis == 1 and groups > 1:
        shape[0] = layer.weight.shape[0]
        values = values.view(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
        shape[1] = values.shape[1]
        return values.view(shape)
    shape[axis] = values.numel()
    return values.view(shape)


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """Transpose a weight if it is stored as (in, out)."""
    return weight.T if fan_in_fan_out else weight
