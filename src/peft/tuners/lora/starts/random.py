# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Starts that draw the factors at random, without a look at the base weight."""

from functools import partial
from typing import Any

import torch
from torch import nn

from ....layers.new_tensors import draw_
from ....utils.error import PeftValueError
from ..low_rank import LowRankLayer
from ..maths import uniform_by_fan_in
from .registry import Start, register_start


@register_start(False)
class Random(Start):
    """
    Both factors at random, so that the adapter has an effect at once; for tests.

    That is how layers of torch are when they are made. Other starts are made of factors that were, as in the released
    package: what is drawn for a seed depends on it.
    """

    needs_matrix = False

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """Draw both factors, and the bias if there is one."""
        into, out = layer.factor_weights(adapter)
        base = layer.stored_weight()
        draw = torch.Tensor.normal_ if layer.is_embedding else uniform_by_fan_in
        draw_(into, base, draw)
        draw_(out, base, draw)
        bias = layer.bias_of_factors(adapter)
        if bias is not None:
            bound = out.shape[1] ** -0.5
            draw_(bias, base, lambda values: values.uniform_(-bound, bound))


@register_start(True)
class Neutral(Start):
    """One factor at random, the other zero: the adapter changes nothing at first."""

    needs_matrix = False

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """Draw the factor that meets the input; that of an embedding is the zero one."""
        into, out = layer.factor_weights(adapter)
        drawn, zero, draw = (out, into, torch.Tensor.normal_)
        if not layer.is_embedding:
            drawn, zero, draw = into, out, partial(self.draw, rank=layer.r[adapter])
        draw_(drawn, layer.stored_weight(), draw)
        zero.zero_()

    def draw(self, weight: torch.Tensor, rank: int) -> None:
        """
        Draw the factor that is not zero.

        Args:
            weight: (r, in), or with more rows for experts.
            rank: rank of the adapter.
        """
        uniform_by_fan_in(weight)


@register_start("gaussian")
class Gaussian(Neutral):
    """Like the neutral start, with factor A from N(0, 1/r^2)."""

    def draw(self, weight: torch.Tensor, rank: int) -> None:
        """Draw from the normal distribution."""
        weight.normal_(std=1 / rank)


@register_start("orthogonal")
class Orthogonal(Neutral):
    """
    Both factors at random, in orthogonal halves of the r dimensions between them.

    B A = 0, so the adapter changes nothing at first, and yet both factors get gradients from the first step on. An
    embedding starts neutrally.
    """

    needs_matrix = True

    def refusal(self, base: nn.Module, rank: int, *layer: Any) -> Exception | None:
        """Say that a rank is odd, or that a convolution has groups; see `Start.refusal`."""
        if isinstance(base, nn.Embedding):
            return None
        if getattr(base, "groups", 1) > 1:
            return PeftValueError(
                "init_lora_weights='orthogonal' does not work for convolutions with groups; use True"
            )
        if rank % 2:
            return PeftValueError(f"init_lora_weights='orthogonal' needs an even rank, found r={rank}")
        return None

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Draw both factors.

        Raises:
            PeftValueError: for an odd rank, and for convolutions with groups.
        """
        if layer.is_embedding:
            super().start(layer, adapter)
            return
        rank = layer.r[adapter]
        refusal = self.refusal(layer.get_base_layer(), rank)
        if refusal is not None:
            raise refusal
        into, out = layer.factor_weights(adapter)
        base, half = layer.stored_weight(), rank // 2
        between = torch.linalg.qr(torch.randn(rank, rank, device="cpu", dtype=torch.float32)).Q
        draw_(into, base, lambda a: a.copy_((a.new_empty(a.shape[1], half).normal_() @ between[0::2]).T * 0.1))
        draw_(out, base, lambda b: b.copy_((between[1::2].T @ b.new_empty(half, b.shape[0]).normal_()).T * 0.1))
