# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Which way a layer is computed: as one function, or in the ordinary way.

What depends on the adapters is decided once, when they have changed. What others may do at any time, such as to add a
hook, is looked at in each call, in the cheapest way that there is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ...utils.computed_weights import find_computed_weight
from ..base_layer import BaseTunerLayer
from ..call_context import names_of_rows
from . import switch
from .linear import Computation, LinearWithAdapters, compute
from .terms import LowRank


# what a subclass can do otherwise than the class that has declared the terms
_METHODS = ("forward", "adapter_forward", "delta_forward", "adapters_to_apply", "_mixed_batch_forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (torch.Tensor, nn.Parameter)
_DROPOUTS = (nn.Dropout, nn.Identity)


class FusedLayer(BaseTunerLayer):
    """
    To be mixed into layers that say what their adapters add in `fused_term`.
    """

    _path: "Path | None" = None

    def fused_term(self, adapter: str) -> LowRank | None:
        """
        Declare what an adapter adds; None if it is nothing that can be declared.

        Args:
            adapter: name of an adapter that this layer has.
        """
        return None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Compute the base layer with the active adapters; see `BaseTunerLayer.forward`.

        Args:
            x: input of the base layer.
            args: passed on.
            kwargs: likewise.
        """
        # compilers fuse by themselves what they see
        if not (args or kwargs or torch.compiler.is_compiling()):
            path = self._path
            if path is None or not path.is_for(self):
                path = self.__dict__["_path"] = Path(self)
            if path.terms and path.is_open(self, x):
                output = path.compute(self, x)
                if output is not None:
                    return output
        return super().forward(x, *args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `BaseTunerLayer.update_layer`."""
        super().update_layer(*args, **kwargs)
        self.__dict__["_path"] = None

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings; see `BaseTunerLayer.remove_adapter`.

        Args:
            adapter_name: name.
        """
        super().remove_adapter(adapter_name)
        self.__dict__["_path"] = None


class Path:
    """
    The way through a layer, for the adapters that are active.

    Args:
        layer: the layer, as it is now.

    Attributes:
        terms: what its adapters add; empty if the layer is computed in the ordinary way.
    """

    __slots__ = ("active", "base", "dictionaries", "held", "modules", "must_be_empty", "parts", "terms")

    def __init__(self, layer: FusedLayer) -> None:
        self.modules, self.active = layer._modules, layer._active_adapter
        self.terms: tuple[LowRank, ...] = tuple(_terms(layer)) if _is_plain(layer) else ()
        if self.terms:
            self.base: nn.Linear = layer.base_layer
            self.held = tuple((holder._modules, term.adapter) for term in self.terms for holder in term.containers)
            self.parts = tuple(holder[name] for holder, name in self.held)
            self.dictionaries = tuple(part.__dict__ for part in (self.base, *self.parts))
            self.must_be_empty = (*_of_all_modules(), *(part[name] for part in self.dictionaries for name in _HOOKS))

    def __reduce__(self) -> tuple[type, tuple]:
        """Leave it out of copies and files: it is found anew where it is needed."""
        return type(None), ()

    def is_for(self, layer: FusedLayer) -> bool:
        """Say whether the layer has the modules and the active adapters for which this was found."""
        return self.active is layer._active_adapter and self.modules is layer._modules

    def is_open(self, layer: FusedLayer, x: torch.Tensor) -> bool:
        """
        Say whether nothing is there, at the moment, for which the layer has to be computed in the ordinary way.

        Args:
            layer: the layer.
            x: its input.
        """
        return not (
            switch.off
            or any(self.must_be_empty)
            or layer._disable_adapters
            or layer._merge_state.contributions
            or type(x) not in _PLAIN
            or x.is_nested
            or any("forward" in own for own in self.dictionaries)
            or names_of_rows(layer, (x,)) is not None
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
        )

    def compute(self, layer: FusedLayer, x: torch.Tensor) -> torch.Tensor | None:
        """
        Compute the layer as one.

        Args:
            layer: the layer.
            x: its input.

        Returns:
            The output; None if the tensors that are there at the moment are none that this can be done with.
        """
        parameters = self.base._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if type(weight) not in _PLAIN or layer._modules["base_layer"] is not self.base:
            return None
        parts = tuple(holder.get(name) for holder, name in self.held)
        if parts != self.parts:  # somebody has put others there
            layer.__dict__["_path"] = None
            return None
        factors: list[torch.Tensor | None] = []
        scales, shares = [], []
        for number, term in enumerate(self.terms):
            if term.adapter in term.otherwise:
                return None
            down, up, dropout = parts[number * 3 : number * 3 + 3]
            factors += (down._parameters.get("weight"), up._parameters.get("weight"), up._parameters.get("bias"))
            scales.append(term.scaling[term.adapter])
            shares.append(dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)
        how = _types(layer, x, weight, bias, factors, scales, shares)
        if how is None:
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *factors)):
            return LinearWithAdapters.apply(how, x, weight, bias, *factors)
        return compute(how, x, weight, bias, factors)


def _types(
    layer: FusedLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    shares: Sequence[float],
) -> Computation | None:
    """Find the types that the ordinary way would compute in; None if it would refuse, or mixes others."""
    own, device = factors[0].dtype if factors[0] is not None else None, x.device
    for number, factor in enumerate(factors):
        if factor is None and number % 3 == 2:
            continue
        if type(factor) not in _PLAIN or factor.dtype != own or factor.device != device:
            return None
    if weight.device != device or not x.is_floating_point() or not x.dim():
        return None
    if any(not 0 <= share < 1 for share in shares) or any(type(scale) not in (float, int) for scale in scales):
        return None
    dtypes = {x.dtype, weight.dtype, own, weight.dtype if bias is None else bias.dtype}
    if torch.is_autocast_enabled(device.type):
        if torch.float64 in dtypes:
            return None
        base = own = torch.get_autocast_dtype(device.type)
    else:
        base = weight.dtype
        may_cast = getattr(layer, "cast_input_dtype_enabled", True)
        if x.dtype != base or (bias is not None and bias.dtype != base) or not (may_cast or x.dtype == own):
            return None
    if not (base.is_floating_point and own.is_floating_point):
        return None
    return Computation(base, own, tuple(scales), tuple(shares))


def _is_plain(layer: FusedLayer) -> bool:
    """Say whether a layer, and the base layer in it, computes as its class says and nothing stands between them."""
    base = layer.base_layer
    declaring = next(kind for kind in type(layer).__mro__ if "fused_term" in kind.__dict__)
    return (
        isinstance(base, nn.Linear)
        and type(base).forward is nn.Linear.forward
        and type(base).__call__ is nn.Module.__call__
        and all(getattr(type(layer), name) is getattr(declaring, name) for name in _METHODS)
        and not any(name in layer.__dict__ for name in _METHODS)
        and layer.quantization_backend is None
        and find_computed_weight(base, "weight") is None
    )


def _terms(layer: FusedLayer) -> Iterator[LowRank]:
    """Yield what the active adapters add; nothing if one of them cannot be declared."""
    names = [name for name in layer.active_adapters if layer.has_adapter(name)]
    terms = [None if name in layer._owners else layer.fused_term(name) for name in names]
    if all(term is not None and _is_linear(term) for term in terms):
        yield from terms


def _is_linear(term: LowRank) -> bool:
    """Say whether the modules of a term compute what their classes say."""
    down, up, dropout = (holder._modules.get(term.adapter) for holder in term.containers)
    return (
        all(isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward for part in (down, up))
        and down._parameters.get("bias") is None
        and type(dropout) in _DROPOUTS
    )


def _of_all_modules() -> Iterable[Mapping]:
    """Give the hooks that are for each module there is."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return tuple(getattr(torch_module, name) for name in (*names, "_global_backward_pre_hooks"))
