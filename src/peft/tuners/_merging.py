# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merging adapters into base weights and taking them out again.

What counts is the base parameter, not the layer: a parameter that several layers share is visited once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from ..utils.error import PeftTypeError, PeftValueError
from ..utils.warning import warn
from ._surgery import adapter_modules, base_modules


if TYPE_CHECKING:
    from .tuners_utils import BaseTunerLayer


@dataclass
class MergeState:
    """
    What is merged into one base weight; layers that share the weight share this object while something is merged.

    Attributes:
        adapters: names, in the order of merging.
        layers: the layers that hold the weight.
        original: the parameter that several modules hold and whose place a copy took, because only some of them were
            adapted; None if the weight was changed in place.
    """

    adapters: list[str] = field(default_factory=list)
    layers: list["BaseTunerLayer"] = field(default_factory=list)
    original: nn.Parameter | None = None


def check_adapters_to_merge(module: "BaseTunerLayer", adapter_names: Sequence[str] | None = None) -> list[str]:
    """
    Find which adapters of a layer are to be merged now.

    Args:
        module: an adapter layer.
        adapter_names: names to merge; the active ones if left out.

    Returns:
        Those names that are not merged yet, in order. Names that are merged already cause a warning.
    """
    refuse_string(adapter_names)
    wanted = list(module.active_adapters if adapter_names is None else adapter_names)
    _warn_if_merged([module], wanted)
    return [name for name in wanted if name not in module.merged_adapters]


def refuse_string(adapter_names: Sequence[str] | None) -> None:
    """Raise if one name was given where a list of names belongs."""
    if isinstance(adapter_names, str):
        raise PeftTypeError(f"adapter_names must be a list of names, found the string {adapter_names!r}")


def _warn_if_merged(layers: Iterable["BaseTunerLayer"], adapter_names: Sequence[str] | None) -> None:
    """Warn, once for all layers, about adapters that are merged already."""
    merged = {
        name: None for layer in layers for name in _wanted(layer, adapter_names) if name in layer.merged_adapters
    }
    if merged:
        warn(f"already merged and left as they are: {', '.join(merged)}")


def _wanted(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge that this layer has."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in layer.available_adapters]


def merge_layer(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None, safe_merge: bool = False) -> None:
    """
    Merge adapters into the base weight of one layer; those that are merged already are left as they are.

    Other modules that hold the weight keep it: the layer gets a copy of its own then.

    Args:
        layer: the adapter layer.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: compute the merged tensors apart first, and refuse them if an entry is not finite.

    Raises:
        PeftValueError: if `safe_merge` finds entries that are not finite; the layer stays as it was.
    """
    names = _wanted(layer, adapter_names)
    for name in names:
        layer.check_mergeable(name)
    if safe_merge:
        check_merge_is_finite([layer], names)
    _merge_sharing([layer], names, apart=layer.base_is_tied)


@torch.no_grad()
def _merge_sharing(layers: Sequence["BaseTunerLayer"], names: Sequence[str], apart: bool) -> None:
    """
    Merge adapters into a weight that layers share and that they shall go on sharing.

    Args:
        layers: layers with one base weight, for which the adapters come from the same source.
        names: adapters to merge.
        apart: whether other modules hold the weight too and must not see a change.
    """
    first = layers[0]
    names = [name for name in names if name not in first.merged_adapters]
    if not names:
        return
    if not first.merged:
        state = MergeState(layers=list(layers))
        if apart:
            state.original = first.get_base_layer()._parameters["weight"]
            copied = nn.Parameter(state.original.detach().clone(), requires_grad=state.original.requires_grad)
            _hold(layers, copied)
        for layer in layers:
            layer._merge_state = state
    for name in names:
        first.merge_weight_(name, first.get_base_weight())
        for layer in layers:
            if layer.bias is not None:
                layer.merge_bias_(name, layer.bias)
        first.merged_adapters.append(name)


def _hold(layers: Iterable["BaseTunerLayer"], parameter: nn.Parameter) -> None:
    """Make a parameter the weight of layers."""
    for layer in layers:
        layer.get_base_layer()._parameters["weight"] = parameter


@contextmanager
def original_weights(layers: Iterable["BaseTunerLayer"]) -> Iterator[None]:
    """Put parameters whose place a merged copy took back inside a context, so that ties can be seen as they were."""
    split = {id(state): state for layer in layers if (state := layer._merge_state).original is not None}
    merged = {key: state.layers[0].get_base_weight() for key, state in split.items()}
    for state in split.values():
        _hold(state.layers, state.original)
    try:
        yield
    finally:
        for key, state in split.items():
            _hold(state.layers, merged[key])


@torch.no_grad()
def unmerge_layer(layer: "BaseTunerLayer") -> None:
    """Take merged adapters out of a layer's base weight, for all layers that share it; the last merged one first."""
    state = layer._merge_state
    if state.original is not None:
        _hold(state.layers, state.original)
    while state.adapters:
        name = state.adapters[-1]  # it stays in the list until it is out of the weight, which may fail
        if state.original is None:
            layer.unmerge_weight_(name, layer.get_base_weight())
        for other in state.layers:
            if other.bias is not None:
                other.unmerge_bias_(name, other.bias)
        state.adapters.pop()
    for other in state.layers:
        other._merge_state = MergeState()


@torch.no_grad()
def check_merge_is_finite(layers: Iterable["BaseTunerLayer"], adapter_names: Sequence[str] | None) -> None:
    """
    Compute what merging would give, without changing a layer.

    Raises:
        PeftValueError: if an entry would not be finite.
    """
    for layer in layers:
        names = [name for name in _wanted(layer, adapter_names) if name not in layer.merged_adapters]
        if not names:
            continue
        weight = layer.get_base_weight().clone()
        bias = None if layer.bias is None else layer.bias.clone()
        for name in names:
            layer.merge_weight_(name, weight)
            if bias is not None:
                layer.merge_bias_(name, bias)
        broken = [key for key, t in (("weight", weight), ("bias", bias)) if t is not None and not t.isfinite().all()]
        if broken:
            raise PeftValueError(
                f"merging {', '.join(names)} would give entries that are not finite in the {' and '.join(broken)} of "
                f"a {type(layer.get_base_layer()).__name__} layer; nothing was merged. The adapter has probably "
                "diverged in training: go back to an earlier checkpoint"
            )


def merge_layers(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
) -> None:
    """
    Merge adapters into the base weights of a model.

    Args:
        model: a model with adapter layers.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: refuse the whole merge, before anything is changed, if an entry would not be finite.
        progressbar: show progress.
    """
    refuse_string(adapter_names)
    layers = [module for _, module in adapter_modules(model) if hasattr(module, "_merge_state")]
    _warn_if_merged(layers, adapter_names)
    for layer in layers:
        for name in _wanted(layer, adapter_names):
            layer.check_mergeable(name)
    if safe_merge:
        check_merge_is_finite(layers, adapter_names)
    holders = _holders(model)
    by_weight: dict[int, list[BaseTunerLayer]] = {}
    for layer in layers:
        by_weight.setdefault(id(layer.get_base_weight()), []).append(layer)
    for weight, sharing in tqdm(by_weight.items(), desc="merging", disable=not progressbar):
        _merge_weight(sharing, adapter_names, holders.get(weight, 1))


def _merge_weight(layers: list["BaseTunerLayer"], adapter_names: Sequence[str] | None, holders: int) -> None:
    """Merge into one weight: in place if all its holders are adapted alike, into copies if they are not."""
    parts: dict[tuple, list[BaseTunerLayer]] = {}
    for layer in layers:
        names = [*layer.merged_adapters, *(n for n in _wanted(layer, adapter_names) if n not in layer.merged_adapters)]
        parts.setdefault(tuple((id(layer.source(name)), name) for name in names), []).append(layer)
    apart = len(parts) > 1 or len({id(layer.get_base_layer()) for layer in layers}) < holders
    if apart:  # what was merged in place for all of them may now belong to some only
        for layer in layers:
            unmerge_layer(layer)
    for contributions, sharing in parts.items():
        if contributions:
            _merge_sharing(sharing, [name for _, name in contributions], apart)


def _holders(model: nn.Module) -> dict[int, int]:
    """Count for each parameter of the base model the places that hold it."""
    counts: dict[int, int] = {}
    for module in base_modules(model):
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts
