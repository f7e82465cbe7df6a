# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Products of LoHa: entry by entry of two matrices of low rank, with derivatives that keep the factors only."""

from collections.abc import Callable
from typing import Any

import torch

from ...utils.own_derivative import OwnDerivative


class HadaWeight(OwnDerivative):
    """The delta of two pairs of factors. Keeps the factors for the backward pass and not the products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        w1a: torch.Tensor,
        w1b: torch.Tensor,
        w2a: torch.Tensor,
        w2b: torch.Tensor,
        scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Compute scale * (w1a w1b) * (w2a w2b)."""
        return ((w1a * scale) @ w1b) * (w2a @ w2b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep the factors."""
        *factors, ctx.scale = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the factors."""
        w1a, w1b, w2a, w2b = ctx.saved_tensors
        grad_1 = grad_out * ((w2a * ctx.scale) @ w2b)
        grad_2 = grad_out * ((w1a * ctx.scale) @ w1b)
        return grad_1 @ w1b.T, w1a.T @ grad_1, grad_2 @ w2b.T, w2a.T @ grad_2, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        """Compute how the delta moves when the factors do."""
        return _product_rule(HadaWeight.forward, ctx.saved_tensors, tangents, ctx.scale)


class HadaWeightCP(OwnDerivative):
    """The delta of a convolution in Tucker form. Keeps the factors for the backward pass and not the products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        t1: torch.Tensor,
        w1a: torch.Tensor,
        w1b: torch.Tensor,
        t2: torch.Tensor,
        w2a: torch.Tensor,
        w2b: torch.Tensor,
        scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Compute scale * X1 * X2, X(out, in, ...) = sum over i, j of t(i, j, ...) wa(i, out) wb(j, in)."""
        return tucker(t1, w1a * scale, w1b) * tucker(t2, w2a, w2b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep the factors."""
        *factors, ctx.scale = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the factors."""
        first, second = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        grad_out = grad_out * ctx.scale
        gradients = []
        for (t, wa, wb), others in ((first, second), (second, first)):
            grad = (grad_out * tucker(*others)).flatten(2)
            core = t.flatten(2)
            half = torch.einsum("oik,ji->ojk", grad, wb)
            gradients += [
                torch.einsum("ojk,po->pjk", half, wa).reshape(t.shape),
                torch.einsum("ojk,pjk->po", half, core),
                torch.einsum("oik,po,pjk->ji", grad, wa, core),
            ]
        return (*gradients, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        """Compute how the delta moves when the factors do."""
        return _product_rule(HadaWeightCP.forward, ctx.saved_tensors, tangents, ctx.scale)


def _product_rule(
    product: Callable[..., torch.Tensor],
    factors: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor | None, ...],
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """Differentiate what is linear in each of its factors: the sum over factors with the tangent in its place."""
    terms = [
        product(*factors[:i], tangent, *factors[i + 1 :], scale)
        for i, tangent in enumerate(tangents[: len(factors)])
        if tangent is not None
    ]
    return sum(terms[1:], terms[0])


def tucker(t: torch.Tensor, wa: torch.Tensor, wb: torch.Tensor) -> torch.Tensor:
    """
    Multiply the core of a Tucker decomposition with its two factors.

    Args:
        t: core, (r, r, *kernel).
        wa: (r, out).
        wb: (r, in).

    Returns:
        (out, in, *kernel).
    """
    return torch.einsum("pj...,po,ji->oi...", t, wa, wb)


def make_weight(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """
    Compute scale * (w1a w1b) * (w2a w2b).

    Args:
        w1a: (out, r).
        w1b: (r, in).
        w2a: (out, r).
        w2b: (r, in).
        scale: a number.

    Returns:
        (out, in).
    """
    return HadaWeight.of(w1a, w1b, w2a, w2b, scale)


def make_weight_cp(
    t1: torch.Tensor,
    w1a: torch.Tensor,
    w1b: torch.Tensor,
    t2: torch.Tensor,
    w2a: torch.Tensor,
    w2b: torch.Tensor,
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """
    Compute the same for factors in Tucker form; see `tucker`.

    Args:
        t1: (r, r, *kernel).
        w1a: (r, out).
        w1b: (r, in).
        t2: (r, r, *kernel).
        w2a: (r, out).
        w2b: (r, in).
        scale: a number.

    Returns:
        (out, in, *kernel).
    """
    return HadaWeightCP.of(t1, w1a, w1b, t2, w2a, w2b, scale)


def low_rank_factors(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Write (w1a w1b) * (w2a w2b) as one product of rank r * r: the Khatri-Rao products of the factors.

    Args:
        w1a: (out, r).
        w1b: (r, in).
        w2a: (out, r).
        w2b: (r, in).

    Returns:
        (out, r * r) and (r * r, in).
    """
    left = (w1a.unsqueeze(2) * w2a.unsqueeze(1)).flatten(1)
    right = (w1b.unsqueeze(1) * w2b.unsqueeze(0)).flatten(0, 1)
    return left, right
