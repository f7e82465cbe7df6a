# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What adapted layers give as `weight` and `bias` to a forward pass that reads them instead of calling the layer.

Fused kernels for a loss or a state space model, the fast path of `nn.TransformerEncoderLayer` and heads that compute
with the matrix of an embedding all do that. What they are given is the weight as the layer would compute with it.
Everywhere else the weight is the parameter that is stored: its identity is what ties, checkpoints and devices go by.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..anatomy.offload import tensor_of
from ..utils.error import PeftError
from ..utils.warning import warn
from .merging.mergeable_layer import MergeableLayer


_CALL = nn.Module._call_impl.__code__


def _read_by_other_module(layer: nn.Module) -> bool:
    """Say whether the code that reads an attribute of a layer runs in the forward pass of another module."""
    if torch.compiler.is_compiling():  # nothing else is compiled, and frames cannot be looked at
        return True
    frame = sys._getframe(3)
    while frame is not None:
        if frame.f_code is _CALL:
            return frame.f_locals["self"] is not layer
        frame = frame.f_back
    return False


def _layers_in_use(layer: nn.Module) -> Iterator[MergeableLayer]:
    """Yield a layer, and the adapter layers inside it, if their adapters have an effect at the moment."""
    while "base_layer" in layer._modules:
        if layer.adapters_to_apply():
            yield layer
        layer = layer._modules["base_layer"]


def read_weight(layer: MergeableLayer) -> torch.Tensor:
    """
    Give the weight of an adapted layer to whoever reads it.

    Args:
        layer: the layer.

    Returns:
        The stored parameter, or in the forward pass of another module the weight with the active adapters. That is
        computed when it is computed with: many models only ask for its type.
    """
    stored = layer.stored_weight()
    if stored is None or layer.quantization_backend is not None or layer.parameter_name is not None or stored.is_meta:
        return stored
    in_use = list(_layers_in_use(layer))
    if not in_use or not _read_by_other_module(layer):
        return stored
    refusal = next(filter(None, map(_why_no_weight, in_use)), None)
    if refusal is not None:
        plain = _needs_plain_tensors(layer, stored)
        return stored if plain else AdaptedWeight(functools.partial(_warn_and_give_stored, layer, refusal), stored)
    compute = functools.partial(_weight_in_stored_type, layer)
    if _needs_plain_tensors(layer, stored):
        return compute()
    parameters = [p for part in in_use for name in part.adapters_to_apply() for p in _parameters(part, name)]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (stored, *parameters)):
        return _Connected.apply(compute, stored, stored, *parameters)
    return AdaptedWeight(compute, stored)


def read_bias(layer: MergeableLayer) -> torch.Tensor | None:
    """
    Give the bias of an adapted layer to whoever reads it; see `read_weight`.

    Args:
        layer: the layer.
    """
    bias = tensor_of(layer.get_base_layer(), "bias")
    in_use = [] if bias is None else layer.adapters_to_apply()
    if not in_use or layer.parameter_name is not None or not _read_by_other_module(layer) or _why_no_weight(layer):
        return bias
    for name in in_use:
        bias = layer.bias_after(name, bias)
    return bias


def _parameters(layer: MergeableLayer, adapter: str) -> Iterator[nn.Parameter]:
    return layer.source(adapter).adapter_parameters(adapter)


def _weight_in_stored_type(layer: MergeableLayer) -> torch.Tensor:
    return layer.effective_weight().to(layer.stored_weight().dtype)


def _why_no_weight(layer: MergeableLayer) -> str | None:
    """Say why an adapter in use cannot be part of a weight; None if all can."""
    for name in layer.adapters_to_apply():
        try:
            layer.check_mergeable(name)
        except PeftError as error:
            return f"adapter {name!r} has no effect there, since it cannot be part of a weight: {error}"
    return None


def _warn_and_give_stored(layer: MergeableLayer, refusal: str) -> torch.Tensor:
    if not layer.__dict__.get("_reading_was_refused"):
        layer.__dict__["_reading_was_refused"] = True
        warn(
            f"a forward pass computes with the weight of a {type(layer.get_base_layer()).__name__} instead of calling "
            f"the layer, and {refusal}. Leave the layer out of target_modules, or switch off what reads its weight, "
            "such as a fused loss"
        )
    return layer.stored_weight()


def _needs_plain_tensors(layer: nn.Module, stored: torch.Tensor) -> bool:
    """Say whether the weight has to be computed at once, for transforms that know no subclasses of tensors."""
    return (
        type(stored) not in (nn.Parameter, torch.Tensor)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or (layer.training and hasattr(layer, "forward_weight"))  # which may have dropout: it is drawn once
    )


class AdaptedWeight(torch.Tensor):
    """
    The weight of a layer with its adapters, computed as soon as somebody computes with it.

    Type, shape and device are known without that. torch's fast paths for transformers pass over tensors that have a
    `__torch_function__`, and call the layers.

    Args:
        compute: gives the weight.
        stored: the weight without adapters.
    """

    _compute: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, compute: Callable[[], torch.Tensor], stored: torch.Tensor) -> "AdaptedWeight":
        """Make a tensor that holds nothing yet."""
        new = torch.Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=stored.dtype, layout=stored.layout, device=stored.device
        )
        new._compute = functools.cache(compute)
        return new

    def __init__(self, compute: Callable[[], torch.Tensor], stored: torch.Tensor) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Show the values."""
        return f"{type(self).__name__}({self._compute()!r})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Do what tensors do; results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Put the computed weight in its place."""
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Connected(torch.autograd.Function):
    """An `AdaptedWeight` whose gradient reaches the tensors of the adapters."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], torch.Tensor], stored: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*parameters)
        return AdaptedWeight(compute, stored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        parameters = [p for p, is_wanted in zip(ctx.saved_tensors, wanted, strict=True) if is_wanted]
        with torch.enable_grad():
            weight = ctx.compute()
        if not weight.requires_grad:  # adapters that only add to the bias
            return None, None, *(None for _ in wanted)
        found = iter(torch.autograd.grad(weight, parameters, gradient, allow_unused=True))
        return None, None, *(next(found) if is_wanted else None for is_wanted in wanted)
