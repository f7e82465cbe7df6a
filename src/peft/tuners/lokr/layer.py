# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoKr's layers: W + scaling * kron(W1, W2), where each of the two may be a product of low-rank factors."""

import math
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, along_features, apply_weight
from ..families.lycoris import LycorisLayer


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """
    Write a number as a product of two.

    Args:
        dimension: the number, positive.
        factor: the first of the two, if it divides `dimension`; else the first is at most this. -1 for no limit.

    Returns:
        The two. If the factor does not decide, the first is the smaller one, as near to the other as possible.

    Example:

        >>> factorization(96), factorization(96, 4), factorization(96, 5)
        ((8, 12), (4, 24), (4, 24))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor <= 0 else min(math.isqrt(dimension), factor)
    small = next(n for n in range(limit, 0, -1) if dimension % n == 0)
    return small, dimension // small


def make_kron(w1: torch.Tensor, w2: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    Compute scale * kron(w1, w2).

    Args:
        w1: (l, m).
        w2: (k, n); or (k, n, *kernel) with two dimensions of the kernel, which the Kronecker product leaves as it is.
            With one dimension, the product is taken over the last two dimensions, as checkpoints of release 0.21.2
            have it.
        scale: a number.

    Returns:
        (l * k, m * n), (l * k, m * n, *kernel) or (k, l * n, m * kernel).
    """
    w1 = w1 * scale
    # torch.kron asks for the strides of a new tensor, also along dimensions of size 1
    w2 = w2.clone(memory_format=torch.contiguous_format)
    return torch.kron(w1.view(*w1.shape, 1, 1) if w2.dim() == 4 else w1, w2)


def make_weight_cp(t: torch.Tensor, wa: torch.Tensor, wb: torch.Tensor) -> torch.Tensor:
    """
    Multiply the core of a Tucker decomposition with its two factors.

    Args:
        t: core, (r, r, *kernel).
        wa: (r, k).
        wb: (r, n).

    Returns:
        (k, n, *kernel).
    """
    return torch.einsum("pj...,po,ji->oi...", t, wa, wb)


class LoKrLayer(LycorisLayer, nn.Module):
    """What LoKr's layers share; the arguments are those of `BaseTunerLayer`."""

    adapter_layer_names = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )
    zero_at_start = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}

    def create_adapter_parameters(self, adapter_name: str, r: int, config: Any) -> None:
        """
        Make W1 and W2, or their factors where these are of a lower rank than the matrix can have.

        Args:
            adapter_name: name.
            r: rank.
            config: the adapter's config.
        """
        out, per_group, *kernel = self._weight_shape()
        (out_1, out_2), (in_1, in_2) = (factorization(n, config.decompose_factor) for n in (out, per_group))
        if config.decompose_both and r < max(out_1, in_1) / 2:
            self.lokr_w1_a[adapter_name] = self.new_parameter(out_1, r)
            self.lokr_w1_b[adapter_name] = self.new_parameter(r, in_1)
        else:
            self.lokr_w1[adapter_name] = self.new_parameter(out_1, in_1)
        if r >= max(out_2, in_2) / 2:
            self.lokr_w2[adapter_name] = self.new_parameter(out_2, in_2, *kernel)
        elif config.use_effective_conv2d and math.prod(kernel) > 1:
            # checkpoints have four dimensions here
            self.lokr_t2[adapter_name] = self.new_parameter(r, r, *kernel, *[1] * (2 - len(kernel)))
            self.lokr_w2_a[adapter_name] = self.new_parameter(r, out_2)
            self.lokr_w2_b[adapter_name] = self.new_parameter(r, in_2)
        else:
            self.lokr_w2_a[adapter_name] = self.new_parameter(out_2, r)
            self.lokr_w2_b[adapter_name] = self.new_parameter(r, in_2 * math.prod(kernel))

    def scaled_w1(self, adapter: str) -> torch.Tensor:
        """
        Give W1 with the delta's scaling.

        Args:
            adapter: name.
        """
        w1 = self.lokr_w1.get(adapter)
        if w1 is None:
            w1 = self.lokr_w1_a[adapter] @ self.lokr_w1_b[adapter]
        return w1 * self.scaling[adapter]

    def w2_factors(self, adapter: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        Give W2 as a product of two.

        Args:
            adapter: name.

        Returns:
            (k, r) and (r, n * kernel), or None and W2 itself if it is not made of two: (k, n, *kernel).
        """
        w2 = self.lokr_w2.get(adapter)
        if w2 is not None:
            return None, w2
        a, b = self.lokr_w2_a[adapter], self.lokr_w2_b[adapter]
        return (None, make_weight_cp(self.lokr_t2[adapter], a, b)) if adapter in self.lokr_t2 else (a, b)

    def compute_delta(self, adapter_name: str) -> torch.Tensor:
        """
        Compute the delta.

        Args:
            adapter_name: name.
        """
        outer, w2 = self.w2_factors(adapter_name)
        return make_kron(self.scaled_w1(adapter_name), w2 if outer is None else outer @ w2)

    def adds_to_weight(self, adapter: str, x: torch.Tensor, apart: bool) -> bool:
        """Say whether the delta has to be built: where it is not a Kronecker product of input and output channels."""
        base, full = self.get_base_layer(), self.source(adapter).lokr_w2.get(adapter)
        channels_meet = isinstance(base, (nn.Linear, *CONVOLUTIONS)) and getattr(base, "groups", 1) == 1
        return not channels_meet or (full is not None and full.dim() == 3)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute what the adapter adds to the output, without the delta where that is possible.

        With channels numbered in two digits, W2 acts on the second digit and W1 on the first.

        Args:
            adapter: name.
            x: the layer's input.
        """
        if self.adds_to_weight(adapter, x, apart=True):
            return super().delta_forward(adapter, x)
        source, base = self.source(adapter), self.get_base_layer()
        w1, (outer, inner) = source.scaled_w1(adapter), source.w2_factors(adapter)
        if outer is not None and 2 * (outer.numel() + inner.numel()) > outer.shape[0] * inner.shape[1]:
            outer, inner = None, outer @ inner  # two small products cost more than one that is twice as large
        (rows, columns), kernel = w1.shape, self._weight_shape()[2:]
        axis = x.dim() - 1 - len(kernel)  # of the channels
        leading = x.shape[:axis]
        x = x.to(inner.dtype).reshape(leading.numel() * columns, x.shape[axis] // columns, *x.shape[axis + 1 :])
        x = apply_weight(base, x, inner.reshape(inner.shape[0], -1, *kernel))
        space = x.shape[2:]
        x = w1 @ x.reshape(leading.numel(), columns, inner.shape[0] * space.numel())
        if outer is not None:
            x = outer @ x.reshape(leading.numel(), rows, outer.shape[1], space.numel())
        x = x.reshape(*leading, self.out_features, *space)
        kept = source.kept_outputs(adapter)
        return x if kept is None else x * along_features(base, kept)


class Linear(LoKrLayer):
    """LoKr on `nn.Linear`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A delta of a linear layer can be approximated by LoRA."""
        return True


class Conv1d(LoKrLayer):
    """LoKr on `nn.Conv1d`."""


class Conv2d(LoKrLayer):
    """LoKr on `nn.Conv2d`."""
