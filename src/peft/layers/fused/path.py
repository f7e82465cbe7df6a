# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Which way a layer is computed: as one function, or in the ordinary way.

What depends on the adapters is decided once, when they have changed. What others may do at any time, such as to add a
hook, is looked at in each call, in the cheapest way that there is.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ...anatomy.kinds import stores_weight_transposed
from ...utils.computed_weights import find_computed_weight
from ..base_layer import BaseTunerLayer
from ..call_context import names_of_rows
from . import switch
from .linear import PER_ADAPTER, Computation, LinearWithAdapters, Tensors, evaluate
from .terms import LowRank


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (torch.Tensor, nn.Parameter)
_DROPOUTS = (nn.Dropout, nn.Identity)
_WITH_GENERATORS = ("cpu", "cuda")
_LARGEST = 1e4


class FusedLayer(BaseTunerLayer):
    """
    To be mixed into layers that say what their adapters add in `fused_term`.

    Attributes:
        computing_methods: what computes the layer in the ordinary way. Where a subclass of the one that has declared
            the terms does one of these otherwise, the terms do not hold.
    """

    computing_methods: tuple[str, ...] = ("forward", "adapter_forward", "delta_forward", "adapters_to_apply")

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

    __slots__ = (
        "active",
        "base",
        "dictionaries",
        "is_transposed",
        "modules",
        "must_be_empty",
        "parts",
        "scaling",
        "terms",
    )

    def __init__(self, layer: FusedLayer) -> None:
        self.modules, self.active, self.scaling = layer._modules, layer._active_adapter, layer.__dict__.get("scaling")
        self.terms: tuple[LowRank, ...] = tuple(_terms(layer)) if _is_plain(layer) else ()
        if self.terms:
            self.base: nn.Module = layer.base_layer
            self.is_transposed = stores_weight_transposed(self.base)
            self.parts = tuple(tuple(_parts(term)) for term in self.terms)
            modules = (self.base, *(part for parts in self.parts for _, part in parts))
            self.dictionaries = tuple(part.__dict__ for part in modules)
            self.must_be_empty = (*_of_all_modules(), *(part[name] for part in self.dictionaries for name in _HOOKS))

    def __reduce__(self) -> tuple[type, tuple]:
        """Leave it out of copies and files: it is found anew where it is needed."""
        return type(None), ()

    def is_for(self, layer: FusedLayer) -> bool:
        """Say whether the layer has the modules, the active adapters and the scalings for which this was found."""
        own = layer.__dict__
        return (
            self.active is layer._active_adapter
            and self.modules is own["_modules"]
            and self.scaling is own.get("scaling")
        )

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
            or self.modules["base_layer"] is not self.base
            or type(x) not in _PLAIN
            or x.is_nested
            or names_of_rows(layer, (x,)) is not None
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
            or any("forward" in own for own in self.dictionaries)
        )

    def compute(self, layer: FusedLayer, x: torch.Tensor) -> torch.Tensor | None:
        """
        Compute the layer as one.

        Args:
            layer: the layer.
            x: its input.

        Returns:
            The output; None if what is there at the moment is nothing that this can be done with.
        """
        parameters = self.base._parameters
        weight, bias, magnitude, norm = parameters.get("weight"), parameters.get("bias"), None, None
        if type(weight) not in _PLAIN:
            return None
        if self.is_transposed:
            weight = weight.t()
        factors: list[torch.Tensor | None] = []
        scales, shares = [], []
        for term, parts in zip(self.terms, self.parts, strict=True):
            name = term.adapter
            for holder, part in parts:
                if holder.get(name) is not part:  # somebody has put another one there
                    layer.__dict__["_path"] = None
                    return None
            if term.strategies.get(name) is not term.strategy:
                return None
            down, up, dropout = parts[0][1]._parameters, parts[1][1]._parameters, parts[2][1]
            factors += (down.get("weight"), up.get("weight"), up.get("bias"))
            scales.append(term.scaling[name])
            shares.append(dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)
            if term.magnitude is not None:
                magnitude, norm = parts[3][1]._parameters.get("weight"), term.norm
                if magnitude is None:
                    return None
        how = _types(layer, x, weight, bias, factors, scales, shares)
        if how is None:
            return None
        norm = None if norm is None else norm()
        if torch.is_grad_enabled():
            for tensor in (x, weight, bias, magnitude, *factors):
                if tensor is not None and tensor.requires_grad:
                    return LinearWithAdapters.apply(how, norm, x, weight, bias, magnitude, *factors)
        return evaluate(how, Tensors(x, weight, bias, magnitude, tuple(factors), norm))


def _types(
    layer: FusedLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: list[torch.Tensor | None],
    scales: list[float],
    shares: list[float],
) -> Computation | None:
    """Find the types that the ordinary way would compute in; None if it would refuse, or mixes others."""
    if x.shape[-1:] != weight.shape[-1:]:
        return None
    base, own = weight.dtype, None
    for number, factor in enumerate(factors):
        if factor is None and number % PER_ADAPTER == 2:
            continue
        if type(factor) not in _PLAIN or factor.dtype != (own or factor.dtype):
            return None
        own = factor.dtype
    for scale, share in zip(scales, shares, strict=True):
        # products take the number as one of the tensors' type, and refuse what that does not have
        if not (0 <= share < 1 and type(scale) in (float, int) and -_LARGEST < scale < _LARGEST):
            return None
    device = x.device.type
    if any(shares) and (device not in _WITH_GENERATORS or (x.is_cuda and torch.cuda.is_current_stream_capturing())):
        return None  # the state of the generator, which masks are found again by, cannot be read
    if torch.is_autocast_enabled(device):
        types = (x.dtype, base, own, base if bias is None else bias.dtype)
        base = own = torch.get_autocast_dtype(device)
        if torch.float64 in types or not all(dtype.is_floating_point for dtype in types):
            return None
    elif x.dtype != base or not base.is_floating_point or (bias is not None and bias.dtype != base):
        return None
    elif own != base and not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    return Computation(base, own, tuple(scales), tuple(shares))


def _is_plain(layer: FusedLayer) -> bool:
    """Say whether a layer, and the base layer in it, computes as its class says and nothing stands between them."""
    base = layer.base_layer
    declaring = next(kind for kind in type(layer).__mro__ if "fused_term" in kind.__dict__)
    return (
        any(isinstance(base, kind) and type(base).forward is kind.forward for kind in (nn.Linear, Conv1D))
        and type(base).__call__ is nn.Module.__call__
        and all(getattr(type(layer), name) is getattr(declaring, name) for name in layer.computing_methods)
        and not any(name in layer.__dict__ for name in layer.computing_methods)
        and layer.quantization_backend is None
        and find_computed_weight(base, "weight") is None
    )


def _terms(layer: FusedLayer) -> Iterator[LowRank]:
    """Yield what the active adapters add; nothing if one of them cannot be declared."""
    names = [name for name in layer.active_adapters if layer.has_adapter(name)]
    terms = [None if name in layer._owners else layer.fused_term(name) for name in names]
    if not all(term is not None and _is_linear(term) for term in terms):
        return
    if len(terms) == 1 or all(term.magnitude is None for term in terms):  # a sum that is scaled may be part of another
        yield from terms


def _parts(term: LowRank) -> Iterator[tuple[Mapping[str, nn.Module], nn.Module]]:
    """Yield the modules of a term, each after what holds it: factors, dropout, magnitudes."""
    for container in (term.down, term.up, term.dropout, term.magnitude):
        if container is not None:
            yield container._modules, container._modules[term.adapter]


def _is_linear(term: LowRank) -> bool:
    """Say whether the modules of a term compute what their classes say."""
    down, up, dropout, *_ = (part for _, part in _parts(term))
    return (
        all(isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward for part in (down, up))
        and down._parameters.get("bias") is None
        and type(dropout) in _DROPOUTS
    )


def _of_all_modules() -> Iterable[Mapping]:
    """Give the hooks that are for each module there is."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return tuple(getattr(torch_module, name) for name in (*names, "_global_backward_pre_hooks"))
