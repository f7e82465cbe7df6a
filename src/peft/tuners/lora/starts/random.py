# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Starts that draw the factors at random, without a look at the base weight."""

import math

import torch

from ....utils.error import PeftValueError
from ..low_rank import LowRankLayer
from .registry import Start, register_start


def uniform_by_fan_in(weight: torch.Tensor) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as `nn.Linear` does; weight is (out, in)."""
    bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
    weight.uniform_(-bound, bound)


@register_start(True)
class Neutral(Start):
    """One factor at random, the other zero: the adapter changes nothing at first."""

    needs_matrix = False

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """Draw the factor that meets the input; that of an embedding is the zero one."""
        into, out = layer.factor_weights(adapter)
        if layer.is_embedding:
            into.zero_()
            out.normal_()
        else:
            self.draw(into, layer.r[adapter])
            out.zero_()

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

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Draw both factors.

        Raises:
            PeftValueError: for an odd rank, and for convolutions with groups.
        """
        if layer.is_embedding:
            super().start(layer, adapter)
            return
        into, out = layer.factor_weights(adapter)
        rank = layer.r[adapter]
        if out.shape[1] != rank:
            raise PeftValueError("init_lora_weights='orthogonal' does not work for convolutions with groups; use True")
        if rank % 2:
            raise PeftValueError(f"init_lora_weights='orthogonal' needs an even rank, found r={rank}")
        between = torch.linalg.qr(torch.randn(rank, rank, device=into.device, dtype=torch.float32)).Q
        half = rank // 2
        rows = torch.randn(half, into.shape[1], device=into.device, dtype=torch.float32)
        columns = torch.randn(out.shape[0], half, device=into.device, dtype=torch.float32)
        into.copy_(between[:, :half] @ rows * 0.1)
        out.copy_(columns @ between[:, half:].T * 0.1)


@register_start(False)
class Random(Start):
    """Both factors at random, so that the adapter has an effect at once; for tests."""

    needs_matrix = False

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """Draw both factors."""
        for weight in layer.factor_weights(adapter):
            if layer.is_embedding:
                weight.normal_()
            else:
                uniform_by_fan_in(weight)
