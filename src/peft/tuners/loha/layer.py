# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoHa's layers: W + scaling * (A1 B1) * (A2 B2), where * between matrices multiplies entry by entry."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..families.lycoris import LycorisLayer


# Cost of one pass over a delta of one entry, in multiplications of a matrix product. Measured, and not critical.
ELEMENTWISE_COST = 16
# Cost of making the factors of the delta, in tokens that meet them.
FACTORS_COST = 4


class HadaWeight(torch.autograd.Function):
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


class HadaWeightCP(torch.autograd.Function):
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
    return HadaWeight.apply(w1a, w1b, w2a, w2b, scale)


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
    return HadaWeightCP.apply(t1, w1a, w1b, t2, w2a, w2b, scale)


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


class LoHaLayer(LycorisLayer, nn.Module):
    """What LoHa's layers share; the arguments are those of `BaseTunerLayer`."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    zero_at_start = {True: ("hada_w2_b",), False: ()}

    def create_adapter_parameters(self, adapter_name: str, r: int, config: Any) -> None:
        """
        Make the factors, in Tucker form if the config asks for it and the layer has a kernel to speak of.

        Args:
            adapter_name: name.
            r: rank.
            config: the adapter's config.
        """
        out, per_group, *kernel = self._weight_shape()
        in_tucker_form = config.use_effective_conv2d and math.prod(kernel) > 1
        columns = per_group if in_tucker_form else per_group * math.prod(kernel)
        for pair in ("hada_w1", "hada_w2"):
            a = (r, out) if in_tucker_form else (out, r)
            getattr(self, f"{pair}_a")[adapter_name] = self.new_parameter(*a)
            getattr(self, f"{pair}_b")[adapter_name] = self.new_parameter(r, columns)
        if in_tucker_form:
            kernel = (*kernel, 1) if len(kernel) == 1 else kernel  # checkpoints have four dimensions here
            self.hada_t1[adapter_name] = self.new_parameter(r, r, *kernel)
            self.hada_t2[adapter_name] = self.new_parameter(r, r, *kernel)

    def _factors(self, adapter: str) -> tuple[torch.Tensor, ...]:
        return tuple(container[adapter] for _, container in self._containers() if adapter in container)

    def compute_delta(self, adapter_name: str) -> torch.Tensor:
        """
        Compute the delta; see `make_weight` and `make_weight_cp`.

        Args:
            adapter_name: name.
        """
        w1a, w1b, w2a, w2b, *cores = self._factors(adapter_name)
        if cores:
            return make_weight_cp(cores[0], w1a, w1b, cores[1], w2a, w2b, self.scaling[adapter_name])
        return make_weight(w1a, w1b, w2a, w2b, self.scaling[adapter_name])


class Linear(LoHaLayer):
    """LoHa on `nn.Linear`."""

    def adds_to_weight(self, adapter: str, x: torch.Tensor, apart: bool) -> bool:
        """
        Compare the two ways to compute, by the multiplications that each adds to those of the base layer.

        Args:
            adapter: name.
            x: the layer's input.
            apart: whether the delta has to meet the input by itself, instead of being added to the weight.
        """
        if type(self.get_base_layer()) is not nn.Linear:  # such as an embedding that follows another layer
            return True
        r = self.source(adapter).r[adapter]
        tokens = x.numel() // max(self.in_features, 1)
        passes = 3 if torch.is_grad_enabled() else 1
        # Added to the weight, a delta costs one more product only in the backward pass, for its own gradient.
        products = passes if apart else passes // 2
        building = self.in_features * self.out_features * (products * tokens + passes * (2 * r + ELEMENTWISE_COST))
        factored = passes * r**2 * (self.in_features + self.out_features) * (tokens + FACTORS_COST)
        return building < factored

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute what the adapter adds to the output, through factors of rank r * r where that costs less.

        Args:
            adapter: name.
            x: (..., in_features)
        """
        if self.adds_to_weight(adapter, x, apart=True):
            return super().delta_forward(adapter, x)
        source = self.source(adapter)
        w1a, *others = source._factors(adapter)
        left, right = low_rank_factors(w1a * source.scaling[adapter], *others)
        kept = source.kept_outputs(adapter)
        if kept is not None:
            left = left * kept.unsqueeze(1)
        return F.linear(F.linear(x.to(left.dtype), right), left)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A delta of a linear layer can be approximated by LoRA."""
        return True


class Conv1d(LoHaLayer):
    """LoHa on `nn.Conv1d`."""


class Conv2d(LoHaLayer):
    """LoHa on `nn.Conv2d`."""
