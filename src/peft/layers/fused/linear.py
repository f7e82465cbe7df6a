# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A linear layer with low-rank adapters as one function for autograd."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .dropout import Drawn, drop, mask_again, masked


_unsafe_view = torch.ops.aten._unsafe_view.default


class Computation(NamedTuple):
    """
    What is computed, beside the tensors.

    Attributes:
        base: type in which the base layer computes, and of the output.
        own: type in which the adapters compute.
        scales: for each adapter, what its term is multiplied by.
        shares: for each adapter, the share of inputs that is dropped.
    """

    base: torch.dtype
    own: torch.dtype
    scales: tuple[float, ...]
    shares: tuple[float, ...]


# an adapter's tensors: factor A, factor B, and the bias of B or None
_PER_ADAPTER = 3


def compute(
    how: Computation,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor | None],
    kept: list[Any] | None = None,
) -> torch.Tensor:
    """
    Compute the layer, without a record for autograd.

    Args:
        how: types, scales and shares.
        x: (..., in).
        weight: of the base layer, (out, in).
        bias: of the base layer, or None.
        factors: A, B, bias of B or None, for each adapter.
        kept: takes what the backward pass needs: for each adapter A x, (rows, r), and what was dropped or None.

    Returns:
        (..., out), no view of anything.
    """
    x2 = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    y = F.linear(_to(x2, how.base), _to(weight, how.base), _bias(how, bias, factors))
    own, wide = _to(x2, how.own), None
    for number, (scale, share) in enumerate(zip(how.scales, how.shares, strict=True)):
        a, b, _ = factors[number * _PER_ADAPTER : (number + 1) * _PER_ADAPTER]
        inputs, drawn = drop(own, share) if share else (own, None)
        hidden = F.linear(inputs, _to(a, how.own))
        up = _to(b, how.own).t()
        if kept is not None:
            kept += (hidden, drawn)
        if how.own == how.base:
            y.addmm_(hidden, up, alpha=scale)
        elif wide is None:
            wide = torch.mm(hidden.mul(scale), up)
        else:
            wide.addmm_(hidden, up, alpha=scale)
    if wide is not None:
        y.add_(wide)  # rounded once
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def formula(
    how: Computation,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """
    Compute the same by operations that autograd follows, for gradients of gradients.

    Args:
        how: see `compute`.
        x: (rows, in).
        weight: see `compute`.
        bias: likewise.
        factors: likewise.
        masks: for each adapter which inputs are kept, or None for all.
    """
    y = F.linear(x.to(how.base), weight.to(how.base), None if bias is None else bias.to(how.base))
    for number, (scale, share, mask) in enumerate(zip(how.scales, how.shares, masks, strict=True)):
        a, b, own_bias = (None if t is None else t.to(how.own) for t in factors[number * 3 : number * 3 + 3])
        inputs = x.to(how.own)
        if mask is not None:
            inputs = inputs * mask / (1 - share)
        y = y + F.linear(F.linear(inputs, a), b, own_bias) * scale
    return y.to(how.base)


class LinearWithAdapters(torch.autograd.Function):
    """`compute`, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Computation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the layer; see `compute`."""
        kept: list[Any] = []
        y = compute(how, x, weight, bias, factors, kept)
        ctx.how, ctx.drawn = how, kept[1::2]
        ctx.save_for_backward(x, weight, bias, *factors, *kept[::2])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give gradients of the input, the base layer's tensors and the factors, as far as they are wanted."""
        how: Computation = ctx.how
        count = len(how.scales)
        x, weight, bias, *rest = ctx.saved_tensors
        factors, hidden = rest[: count * _PER_ADAPTER], rest[count * _PER_ADAPTER :]
        wanted = ctx.needs_input_grad[1:]
        x2 = x.reshape(-1, x.shape[-1])
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return None, *_backward(how, wanted, gradient, x, x2, weight, bias, factors, hidden, ctx.drawn)
        return None, *_backward(how, wanted, gradient, x, x2, weight, bias, factors, hidden, ctx.drawn)


def _backward(
    how: Computation,
    wanted: Sequence[bool],
    gradient: torch.Tensor,
    x: torch.Tensor,
    x2: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor | None],
    hidden: Sequence[torch.Tensor],
    drawn: Sequence[Drawn | None],
) -> list[torch.Tensor | None]:
    gradient = gradient.reshape(-1, gradient.shape[-1])
    own_x, own_gradient = _to(x2, how.own), _to(gradient, how.own)
    masks = [None if what is None else mask_again(own_x, what) for what in drawn]
    if torch.is_grad_enabled():
        return _recorded(how, wanted, gradient, x, weight, bias, factors, masks)
    found: list[torch.Tensor | None] = [None] * len(wanted)
    dx = torch.mm(gradient, _to(weight, how.base)) if wanted[0] else None
    if wanted[1]:
        found[1] = torch.mm(gradient.t(), _to(x2, how.base)).to(weight.dtype)
    if wanted[2]:
        found[2] = gradient.sum(0).to(bias.dtype)
    for number, (scale, mask) in enumerate(zip(how.scales, masks, strict=True)):
        place = number * _PER_ADAPTER
        a, b, own_bias = factors[place : place + _PER_ADAPTER]
        wants_a, wants_b, wants_bias = wanted[3 + place : 3 + place + _PER_ADAPTER]
        if wants_b:
            found[3 + place + 1] = torch.mm(own_gradient.t(), hidden[number]).mul_(scale).to(b.dtype)
        if wants_bias:
            found[3 + place + 2] = own_gradient.sum(0).mul_(scale).to(own_bias.dtype)
        if not (wants_a or wanted[0]):
            continue
        dh = torch.mm(own_gradient, _to(b, how.own)).mul_(scale)
        if wants_a:
            inputs = own_x if mask is None else masked(own_x, mask, how.shares[number])
            found[3 + place] = torch.mm(dh.t(), inputs).to(a.dtype)
        if not wanted[0]:
            continue
        if mask is None and how.own == how.base:
            dx.addmm_(dh, _to(a, how.own))
        else:
            term = torch.mm(dh, _to(a, how.own))
            dx.add_(term if mask is None else masked(term, mask, how.shares[number]))
    found[0] = None if dx is None else _to(dx, x.dtype).view(x.shape)
    return found


def _recorded(
    how: Computation,
    wanted: Sequence[bool],
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Give gradients that themselves have gradients, by the formula."""
    inputs = (x, weight, bias, *factors)
    chosen = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    y = formula(how, x.reshape(-1, x.shape[-1]), weight, bias, factors, masks)
    found = iter(torch.autograd.grad(y, chosen, gradient, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _bias(how: Computation, bias: torch.Tensor | None, factors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Add the biases of the adapters, which are scaled, to that of the base layer."""
    total = None if bias is None else _to(bias, how.base)
    for scale, own_bias in zip(how.scales, factors[2::_PER_ADAPTER], strict=True):
        if own_bias is not None:
            own = _to(own_bias, how.own) * scale
            total = own.to(how.base) if total is None else (total + own).to(how.base)
    return total


def _to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor; the question costs less than the call."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
