# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
VeLoRA: plain LoRA, of which less is kept for the backward pass: inputs of factor A as their projections on one vector.

Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", 2024, arXiv:2405.17991.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ....layers.buffer_dict import BufferDict
from ....layers.new_tensors import draw_
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..starts import Start
from .base import OfLinearLayers
from .registry import register_variant


class VeloraFunction(torch.autograd.Function):
    """
    A linear layer that keeps projections of its inputs for the gradient of its weight.

    Example:

        >>> import torch
        >>> from peft.tuners.lora.velora import VeloraFunction
        >>> x, weight, vector = torch.ones(3, 4), torch.ones(2, 4, requires_grad=True), torch.tensor([0.6, 0.8])
        >>> VeloraFunction.apply(x, weight, None, vector, 2, 1.0).sum().backward()
        >>> weight.grad[0]
        tensor([2.5200, 3.3600, 2.5200, 3.3600])
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        embed: torch.Tensor,
        num_groups: int,
        velora_scale: float,
    ) -> torch.Tensor:
        """
        Apply the layer.

        Args:
            ctx: what the backward pass is given.
            input: (..., in).
            weight: (out, in).
            bias: (out,) or None.
            embed: (width of a group,), what groups of features are projected on.
            num_groups: number of groups.
            velora_scale: what the reconstruction is multiplied by.

        Returns:
            (..., out).
        """
        ctx.save_for_backward(compressed(input, embed, num_groups), weight, embed)
        ctx.scale, ctx.has_bias = velora_scale, bias is not None
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        Compute the gradients: of the input exactly, of the weight from the reconstruction.

        Args:
            ctx: what the forward pass has left.
            grad_output: (..., out).
        """
        # with autocast, gradients are in another type than what the layer was given
        kept, weight, embed = (tensor.to(grad_output.dtype) for tensor in ctx.saved_tensors)
        of_input = grad_output @ weight if ctx.needs_input_grad[0] else None
        rows = grad_output.flatten(0, -2)
        of_weight = None
        if ctx.needs_input_grad[1]:
            # first the sum over rows, so that the inputs are never rebuilt: (out, groups), then each group's features
            by_group = rows.T @ kept
            of_weight = (by_group.unsqueeze(-1) * (ctx.scale * embed)).flatten(1)[:, : weight.shape[1]]
        of_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias, None, None, None


def grouped(input: torch.Tensor, num_groups: int) -> torch.Tensor:
    """
    Cut rows of features into groups of neighbours, the last of them filled up with zeros.

    Args:
        input: (..., in).
        num_groups: number of groups.

    Returns:
        (rows, groups, features of a group).
    """
    rows = input.reshape(-1, input.shape[-1])
    width = group_width(input.shape[-1], num_groups)
    return F.pad(rows, (0, num_groups * width - rows.shape[1])).view(len(rows), num_groups, width)


def group_width(in_features: int, num_groups: int) -> int:
    """Say how many features a group has."""
    return math.ceil(in_features / num_groups)


def compressed(input: torch.Tensor, embed: torch.Tensor, num_groups: int) -> torch.Tensor:
    """
    Project groups of features on a vector.

    Args:
        input: (..., in).
        embed: (features of a group,).
        num_groups: number of groups.

    Returns:
        (rows, groups).
    """
    return grouped(input, num_groups) @ embed.to(input.dtype)


@torch.no_grad()
def mean_direction(input: torch.Tensor, num_groups: int) -> torch.Tensor:
    """
    Compute the direction of the mean of all groups of all rows; any one direction if it is zero.

    Args:
        input: (..., in).
        num_groups: number of groups.

    Returns:
        (features of a group,) in float32, of norm 1.
    """
    mean = grouped(input, num_groups).flatten(0, 1).float().mean(0)
    norm = mean.norm()
    return torch.where(norm > 0, mean / norm, torch.full_like(mean, len(mean) ** -0.5))


@register_variant("velora_config")
class Velora(OfLinearLayers):
    """
    VeLoRA: the forward pass, the delta and its merge are plain LoRA's, and so are all gradients but that of A.

    The vector that inputs are projected on is saved with the adapter. "batch_average" makes it anew in each forward
    pass of a training step, "batch_average_once" in the first one that finds it zero, and "random" never.
    """

    name = "VeLoRA (velora_config)"
    adds_delta = True
    # whether the vector is known to be set; asking the vector each time would wait for the device
    is_set = False

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.settings = config.velora_config

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the vector."""
        width = group_width(layer.in_features, self.settings.num_groups)
        vectors = layer.container("lora_velora_embed", BufferDict)
        vectors.put(adapter, layer.new_parameter(width).detach(), persistent=True)

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start the factors, and then the vector: a random direction, or zero until there is a batch."""
        start.start(layer, adapter)
        vector, self.is_set = layer.lora_velora_embed[adapter], False
        if self.settings.init_type == "random":
            draw_(vector, layer.stored_weight(), _draw_direction)
        else:
            vector.zero_()

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x, with less kept where a gradient of A will be asked for."""
        a = layer.lora_A[adapter]
        if not (layer.training and torch.is_grad_enabled() and a.weight.requires_grad):
            return layer.delta_forward(adapter, x)
        x = layer.prepared_input(adapter, x)
        vector = self._vector_for(layer, adapter, x)
        hidden = VeloraFunction.apply(x, a.weight, a.bias, vector, self.settings.num_groups, self.settings.scale)
        return layer.output_of(adapter, hidden * layer.scaling[adapter])

    @torch.no_grad()
    def _vector_for(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Give the vector for a batch, a copy, since the next batch writes to the one that is kept."""
        vector, kind = layer.lora_velora_embed[adapter], self.settings.init_type
        if kind == "batch_average_once" and not self.is_set:
            self.is_set = bool(vector.any())  # a checkpoint may have brought it
        if kind == "batch_average" or (kind == "batch_average_once" and not self.is_set):
            vector.copy_(mean_direction(x, self.settings.num_groups))
            self.is_set = True
        return vector.clone()


def _draw_direction(vector: torch.Tensor) -> None:
    vector.normal_()
    vector.div_(vector.norm())
