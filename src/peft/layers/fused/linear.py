# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A linear layer with low-rank adapters as one function for autograd."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .dropout import State, draw, draw_again, keeps_mask, masked


_unsafe_view = torch.ops.aten._unsafe_view.default

# whether products of halves can be given in float32, which accelerators can do
_CAN_WIDEN = "dtype" in torch.ops.aten.mm.overloads()

# an adapter's tensors: factor A, factor B, and the bias of B or None
PER_ADAPTER = 3


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


class Tensors(NamedTuple):
    """
    What the layer is computed from.

    Attributes:
        x: the input, (..., in).
        weight: of the base layer, (out, in).
        bias: of the base layer, (out,), or None.
        magnitude: what each output feature is scaled to, (out,); None for adapters that only add.
        factors: for each adapter A, (r, in), B, (out, r), and the bias of B or None.
        norm: what each output feature is divided by, (out,), a constant; None as `magnitude`.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    factors: tuple[torch.Tensor | None, ...]
    norm: torch.Tensor | None

    @property
    def rows(self) -> torch.Tensor:
        """The input as a matrix."""
        return self.x if self.x.dim() == 2 else self.x.reshape(-1, self.x.shape[-1])

    def adapter(self, number: int) -> tuple[torch.Tensor | None, ...]:
        """Give the tensors of one adapter."""
        return self.factors[number * PER_ADAPTER : (number + 1) * PER_ADAPTER]


def evaluate(how: Computation, of: Tensors) -> torch.Tensor:
    """
    Compute the layer where no gradients are recorded.

    Args:
        how: types, scales and shares.
        of: the tensors.
    """
    x, weight, bias, magnitude, factors, _ = of
    is_narrow = how.own == how.base
    if magnitude is not None or any(how.shares) or x.dim() < 2 or not (is_narrow or len(how.scales) == 1):
        return _shaped(_scaled(how, of, _sum(how, of, _hidden(how, of)[0])), x)
    # the same with less of Python, which single tokens wait for
    y = F.linear(_to(x, how.base), _to(weight, how.base), _bias(how, bias, factors))
    if not is_narrow:
        a, b, _ = factors
        term = F.linear(F.linear(_to(x, how.own), _to(a, how.own)), _to(b, how.own))
        return y.add_(term, alpha=how.scales[0])  # rounded once
    flat = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    x = _to(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), how.own)
    for number, scale in enumerate(how.scales):
        a, b, _ = of.adapter(number)
        flat.addmm_(F.linear(x, _to(a, how.own)), _to(b, how.own).t(), alpha=scale)
    return y


def keeps_sum(x: torch.Tensor) -> bool:
    """Say whether the sum that is scaled, as large as the output, is kept for the gradient of the magnitudes."""
    return not x.is_cuda  # where memory is what is short, and it is computed again


class LinearWithAdapters(torch.autograd.Function):
    """The layer, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Computation,
        norm: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        magnitude: torch.Tensor | None,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the layer; see `Tensors`."""
        of = Tensors(x, weight, bias, magnitude, factors, norm)
        hidden, masks, states = _hidden(how, of)
        if keeps_mask(x):
            states = [None] * len(states)
        else:
            masks = [None] * len(masks)
        total = _sum(how, of, hidden)
        kept = total if magnitude is not None and keeps_sum(x) else None
        ctx.how, ctx.states = how, states
        ctx.save_for_backward(x, weight, bias, magnitude, *factors, norm, kept, *hidden, *masks)
        return _shaped(_scaled(how, of, total, in_place=kept is None), x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give gradients of the input, the base layer's tensors and the adapters', as far as they are wanted."""
        how: Computation = ctx.how
        count = len(how.scales)
        end = 4 + count * PER_ADAPTER
        saved = ctx.saved_tensors
        of = Tensors(*saved[:4], saved[4:end], saved[end])
        kept, hidden, masks = saved[end + 1], saved[end + 2 : end + 2 + count], saved[end + 2 + count :]
        wanted, device = ctx.needs_input_grad[2:], of.x.device.type
        gradient = gradient.reshape(-1, gradient.shape[-1])
        own_x = _to(of.rows, how.own)
        masks = [
            mask if state is None else draw_again(own_x, share, state)
            for mask, share, state in zip(masks, how.shares, ctx.states, strict=True)
        ]
        # what was cast is cast here
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if torch.is_grad_enabled():
                return None, None, *_recorded(how, of, masks, gradient, wanted)
            return None, None, *_gradients(how, of, masks, hidden, kept, gradient, own_x, wanted)


def _hidden(how: Computation, of: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[State | None]]:
    """Compute for each adapter A x, scaled, (rows, r), and say what is left of x where some of it is dropped."""
    own, hidden = _to(of.rows, how.own), []
    masks, states = [None] * len(how.shares), [None] * len(how.shares)
    for number, share in enumerate(how.shares):
        inputs = own
        if share:
            inputs, masks[number], states[number] = draw(own, share)
        down = _to(of.adapter(number)[0], how.own).t()
        hidden.append(_product(inputs, down, how.scales[number]))
    return hidden, masks, states


def _sum(how: Computation, of: Tensors, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute W x and what the adapters add, (rows, out); with the biases, but for that which is not scaled."""
    bias = _bias(how, None if of.magnitude is not None else of.bias, of.factors)
    y = F.linear(_to(of.rows, how.base), _to(of.weight, how.base), bias)
    wide = None
    for number, narrow in enumerate(hidden):
        up = _to(of.adapter(number)[1], how.own).t()
        if how.own == how.base:
            y.addmm_(narrow, up)
        elif wide is None:
            wide = torch.mm(narrow, up)
        else:
            wide.addmm_(narrow, up)
    return y if wide is None else y.add_(wide)  # rounded once


def _scaled(how: Computation, of: Tensors, total: torch.Tensor, in_place: bool = True) -> torch.Tensor:
    """Scale the sum by feature, where adapters do more than add."""
    if of.magnitude is None:
        return total
    scale, out = of.magnitude / of.norm, total if in_place else torch.empty_like(total)
    if of.bias is None:
        return torch.mul(total, scale, out=out)
    return torch.addcmul(_to(of.bias, scale.dtype), total, scale, out=out)


def _gradients(
    how: Computation,
    of: Tensors,
    masks: Sequence[torch.Tensor | None],
    hidden: Sequence[torch.Tensor],
    kept: torch.Tensor | None,
    gradient: torch.Tensor,
    own_x: torch.Tensor,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Give the gradients of x, weight, bias, magnitude and factors."""
    wants_x, wants_weight, wants_bias, wants_magnitude = wanted[:4]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if wants_bias:
        found[2] = gradient.sum(0).to(of.bias.dtype)
    if of.magnitude is not None:
        if wants_magnitude:
            total = _sum(how, of, hidden) if kept is None else kept
            summed = (gradient * total).sum(0, dtype=of.norm.dtype)
            found[3] = (summed / of.norm).to(of.magnitude.dtype)
        gradient = torch.mul(gradient, of.magnitude / of.norm, out=torch.empty_like(gradient))
    dx = torch.mm(gradient, _to(of.weight, how.base)) if wants_x else None
    if wants_weight:
        found[1] = _product(gradient.t(), _to(of.rows, how.base), dtype=of.weight.dtype)
    gradient = _to(gradient, how.own)
    for number, (scale, mask) in enumerate(zip(how.scales, masks, strict=True)):
        a, b, bias = of.adapter(number)
        place = 4 + number * PER_ADAPTER
        wants_a, wants_b, wants_bias = wanted[place : place + PER_ADAPTER]
        if wants_b:
            found[place + 1] = _product(gradient.t(), hidden[number], dtype=b.dtype)
        if wants_bias:
            found[place + 2] = gradient.sum(0).mul_(scale).to(bias.dtype)
        if not (wants_a or wants_x):
            continue
        narrow = _product(gradient, _to(b, how.own), scale)
        if wants_a:
            inputs = own_x if mask is None else masked(own_x, mask, how.shares[number])
            found[place] = _product(narrow.t(), inputs, dtype=a.dtype)
        if wants_x and mask is None and how.own == how.base:
            dx.addmm_(narrow, _to(a, how.own))
        elif wants_x:
            term = torch.mm(narrow, _to(a, how.own))
            dx.add_(term if mask is None else masked(term, mask, how.shares[number]))
    found[0] = None if dx is None else _to(dx, of.x.dtype).view(of.x.shape)
    return found


def _recorded(
    how: Computation,
    of: Tensors,
    masks: Sequence[torch.Tensor | None],
    gradient: torch.Tensor,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Give gradients that have gradients themselves."""
    inputs = (of.x, of.weight, of.bias, of.magnitude, *of.factors)
    chosen = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    y = _formula(how, of, masks)
    found = iter(torch.autograd.grad(y, chosen, gradient, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _formula(how: Computation, of: Tensors, masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Compute the layer, (rows, out), by operations that autograd follows."""
    y = F.linear(of.rows.to(how.base), of.weight.to(how.base))
    for number, (scale, share, mask) in enumerate(zip(how.scales, how.shares, masks, strict=True)):
        a, b, bias = (None if tensor is None else tensor.to(how.own) for tensor in of.adapter(number))
        inputs = of.rows.to(how.own)
        if mask is not None:
            inputs = inputs * (mask / (1 - share) if mask.dtype == torch.bool else mask).to(how.own)
        y = y + F.linear(F.linear(inputs, a), b, bias) * scale
    if of.magnitude is not None:
        y = y * (of.magnitude / of.norm)
    return (y if of.bias is None else y + of.bias).to(how.base)


def _bias(how: Computation, bias: torch.Tensor | None, factors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Add the biases of the adapters, which are scaled, to that of the base layer."""
    total = None if bias is None else _to(bias, how.base)
    for scale, own_bias in zip(how.scales, factors[2::PER_ADAPTER], strict=True):
        if own_bias is not None:
            own = _to(own_bias, how.own) * scale
            total = own.to(how.base) if total is None else (total + own).to(how.base)
    return total


def _product(
    left: torch.Tensor, right: torch.Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply matrices, by a number too, and give the result in another type, with as few kernels as there can be."""
    if scale != 1:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    if _CAN_WIDEN and left.is_cuda and dtype == torch.float32 and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=dtype)
    return _to(torch.mm(left, right), dtype or left.dtype)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Give the rows the shape of the input; no view, so that the output can be changed in place."""
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor; the question costs less than the call."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
