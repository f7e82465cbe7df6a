# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Products of LoKr."""

import math

import torch
from torch import nn

from ...anatomy.kinds import apply_weight


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


def kron_forward(
    layer: nn.Module,
    x: torch.Tensor,
    w1: torch.Tensor,
    outer: torch.Tensor | None,
    inner: torch.Tensor,
    kernel: tuple[int, ...],
) -> torch.Tensor:
    """
    Compute what a layer would with kron(w1, outer inner) for a weight, without building that.

    With channels numbered in two digits, W2 acts on the second digit and W1 on the first.

    Args:
        layer: says the kind, and how windows are laid over the input.
        x: its input.
        w1: (l, m).
        outer: (k, r), or None where W2 is no product.
        inner: (r, n * kernel), or W2 itself, (k, n, *kernel).
        kernel: size of the kernel; empty for linear layers.
    """
    if outer is not None and 2 * (outer.numel() + inner.numel()) > outer.shape[0] * inner.shape[1]:
        outer, inner = None, outer @ inner  # two small products cost more than one that is twice as large
    (rows, columns), axis = w1.shape, x.dim() - 1 - len(kernel)  # of the channels
    leading = x.shape[:axis]
    x = x.to(inner.dtype).reshape(leading.numel() * columns, x.shape[axis] // columns, *x.shape[axis + 1 :])
    x = apply_weight(layer, x, inner.reshape(inner.shape[0], -1, *kernel))
    space = x.shape[2:]
    x = w1 @ x.reshape(leading.numel(), columns, inner.shape[0] * space.numel())
    if outer is not None:
        x = outer @ x.reshape(leading.numel(), rows, outer.shape[1], space.numel())
    out = rows * (inner if outer is None else outer).shape[0]
    return x.reshape(*leading, out, *space)
