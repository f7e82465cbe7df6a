# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merging adapters into base weights and taking them out again.

What counts is the base parameter, not the layer: a parameter that several layers share is visited once.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from ..utils.error import PeftRuntimeError, PeftTypeError, PeftValueError
from ..utils.offload import refuse_merge_into_offloaded
from ..utils.same_tensor import identity_of
from ..utils.warning import warn
from ._surgery import adapter_modules, base_modules


if TYPE_CHECKING:
    from .tuners_utils import BaseTunerLayer

    Contribution = tuple["BaseTunerLayer", str]


@dataclass
class Original:
    """
    A tensor of the base model in whose place a module holds another one while something is merged.

    Quantised layers also have attributes that go with the tensor.
    """

    module: nn.Module
    name: str
    tensor: torch.Tensor | None

    def swap(self) -> None:
        """Exchange the tensor with the one that the module holds."""
        held = _holder(self.module, self.name)
        held[self.name], self.tensor = self.tensor, held[self.name]


@dataclass
class MergeState:
    """
    What is merged into one base weight.

    The layers around one base layer share this object. Layers whose base layers share the weight share it too while
    something is merged.

    Attributes:
        contributions: the layer that has an adapter's tensors and the adapter's name, in the order of merging.
        layers: the layers that use the weight.
        originals: tensors of the base model that were replaced, not changed in place: because other modules that were
            not adapted hold them too, or because there is no way back.
    """

    contributions: list["Contribution"] = field(default_factory=list)
    layers: list["BaseTunerLayer"] = field(default_factory=list)
    originals: list[Original] = field(default_factory=list)

    def replaces(self, name: str) -> bool:
        """Say whether a tensor of that name was replaced."""
        return any(original.name == name for original in self.originals)

    def replace(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into a module of the base model; what stood there at first is kept."""
        held = _holder(module, name)
        if not any(original.module is module and original.name == name for original in self.originals):
            self.originals.append(Original(module, name, held[name]))
        held[name] = tensor


def _holder(module: nn.Module, name: str) -> dict[str, torch.Tensor | None]:
    holders = (module._parameters, module._buffers, module.__dict__)
    return next(held for held in holders if name in held)


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
        name: None
        for layer in layers
        if layer.merged
        for name in _wanted(layer, adapter_names)
        if name in layer.merged_adapters
    }
    if merged:
        warn(f"already merged and left as they are: {', '.join(merged)}")


def _wanted(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge that this layer has."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if layer.has_adapter(name)]


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
    _check_mergeable([layer], names)
    if safe_merge:
        check_merge_is_finite([layer], names)
    _merge_sharing([layer], [(layer.source(name), name) for name in names], apart=layer.base_is_tied)


def _check_mergeable(layers: Iterable["BaseTunerLayer"], adapter_names: Sequence[str] | None) -> None:
    """Refuse what cannot be merged, before anything is changed, and warn of weights that are rounded by it."""
    quantised: dict[str, None] = {}
    for layer in layers:
        base, backend = layer.get_base_layer(), layer.quantization_backend
        wanted = _wanted(layer, adapter_names)
        together = list(dict.fromkeys([*layer.merged_adapters, *wanted]))
        if len(together) > 1:
            layer.check_mergeable_together(together)
        for name in wanted:
            refuse_merge_into_offloaded(base)
            _refuse_without_storage(layer, name)
            layer.check_mergeable(name)
            if backend is not None:
                backend.check_mergeable(base)
                quantised[backend.name] = None
    if quantised:
        warn(
            f"merging into weights that are quantised ({', '.join(quantised)}) rounds them anew, so outputs differ a "
            "little from those of the adapter beside the weights; unmerging brings the weights back as they were"
        )


def _refuse_without_storage(layer: "BaseTunerLayer", name: str) -> None:
    """Refuse adapters that were made on the meta device and got no values yet."""
    stored = layer.stored_weight()
    parameters = layer.source(name).adapter_parameters(name)
    if stored is not None and not stored.is_meta and any(parameter.is_meta for parameter in parameters):
        raise PeftRuntimeError(
            f"adapter {name!r} is on the meta device and has no content; an adapter that was made with "
            "low_cpu_mem_usage=True has to be loaded before it can be merged"
        )


@torch.no_grad()
def _merge_sharing(
    layers: Sequence["BaseTunerLayer"], contributions: Iterable["Contribution"], apart: bool, for_good: bool = False
) -> None:
    """
    Merge adapters into a weight that layers share and that they shall go on sharing.

    Args:
        layers: layers with one base weight, for which the adapters come from the same source.
        contributions: what to merge.
        apart: whether other modules hold the weight too and must not see a change.
        for_good: nobody will unmerge.
    """
    state = layers[0]._merge_state
    new = [contribution for contribution in contributions if contribution not in state.contributions]
    if not new:
        return
    everything = [*state.contributions, *new]
    backend = layers[0].quantization_backend
    needs_original = backend is not None or not all(source.can_unmerge(name) for source, name in everything)
    copied = backend is None and (apart or (needs_original and not for_good))
    # what is rounded each time that it is changed is merged anew, from the original
    not_replaced = backend is not None or not state.replaces(layers[0].weight_name)
    if state.contributions and (copied or needs_original) and not_replaced:
        unmerge_layer(layers[0])
        new = everything
    if not layers[0]._merge_state.contributions:
        _join(layers)
        if copied:
            _replace_weight(layers)
    state = layers[0]._merge_state
    for source, name in new:
        source.prepare_merge(name)
    weight = layers[0].get_base_weight()
    for source, name in new:
        source.merge_weight_(name, weight)
        _merge_other_tensors(state, [layer for layer in layers if layer.source(name) is source], name)
        state.contributions.append((source, name))
    if backend is not None:
        _store_quantized(layers, weight, keep=apart or not for_good)


def _join(layers: Iterable["BaseTunerLayer"]) -> None:
    """Give one state to all layers around the base layers of these."""
    around = {id(layer): layer for first in layers for layer in first._merge_state.layers}
    state = MergeState(layers=list(around.values()))
    for layer in state.layers:
        layer._merge_state = state


def _replace_weight(layers: Sequence["BaseTunerLayer"]) -> None:
    """Give layers a copy of the weight that they share."""
    weight = layers[0].get_base_weight()
    copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for layer in layers:
        layer._merge_state.replace(layer.get_base_layer(), layer.weight_name, copied)


def _store_quantized(layers: Sequence["BaseTunerLayer"], weight: torch.Tensor, keep: bool) -> None:
    """Quantise a merged weight, and give it to the layers that share it; what they had can be kept."""
    for name, value in layers[0].quantization_backend.requantize(layers[0].get_base_layer(), weight).items():
        for layer in layers:
            if keep:
                layer._merge_state.replace(layer.get_base_layer(), name, value)
            else:
                _holder(layer.get_base_layer(), name)[name] = value


def _merge_other_tensors(state: MergeState, layers: Iterable["BaseTunerLayer"], name: str) -> None:
    """Replace what an adapter changes in base layers beside the weight; what they share, they go on sharing."""
    merged: dict[Hashable, torch.Tensor] = {}
    for layer in layers:
        base = layer.get_base_layer()
        for tensor_key, value in layer.merged_tensors(name).items():
            path, _, tensor_name = tensor_key.rpartition(".")
            module = base.get_submodule(path)
            present = _holder(module, tensor_name)[tensor_name]
            key = identity_of(present)
            if key not in merged:
                is_parameter = isinstance(present, nn.Parameter)
                merged[key] = nn.Parameter(value, present.requires_grad) if is_parameter else value
            state.replace(module, tensor_name, merged[key])


@contextmanager
def original_weights(layers: Iterable["BaseTunerLayer"]) -> Iterator[None]:
    """Put tensors whose place a merged one took back inside a context, so that ties can be seen as they were."""
    states = {id(layer._merge_state): layer._merge_state for layer in layers}.values()
    originals = [original for state in states for original in state.originals]
    for original in originals:
        original.swap()
    try:
        yield
    finally:
        for original in originals:
            original.swap()


@torch.no_grad()
def unmerge_layer(layer: "BaseTunerLayer") -> None:
    """Take merged adapters out of a layer's base weight, for all layers that share it; the last merged one first."""
    state = layer._merge_state
    while state.contributions:
        source, name = state.contributions[-1]  # it stays in the list until it is out of the weight, which may fail
        if not state.replaces(source.weight_name):
            source.unmerge_weight_(name, layer.get_base_weight())
        state.contributions.pop()
    for original in state.originals:
        original.swap()
    around: dict[tuple[int, str], list[BaseTunerLayer]] = {}
    for other in state.layers:
        around.setdefault((id(other.get_base_layer()), other.weight_name), []).append(other)
    for others in around.values():
        fresh = MergeState(layers=others)
        for other in others:
            other._merge_state = fresh


@torch.no_grad()
def check_merge_is_finite(layers: Iterable["BaseTunerLayer"], adapter_names: Sequence[str] | None) -> None:
    """
    Compute what merging would give, without changing a layer.

    Raises:
        PeftValueError: if an entry would not be finite.
    """
    for layer in layers:
        names = [name for name in _wanted(layer, adapter_names) if name not in layer.merged_adapters]
        if not names or layer.stored_weight() is None:
            continue
        tensors = {layer.weight_name: layer.get_base_weight().clone()}
        for name in names:
            layer.source(name).merge_weight_(name, tensors[layer.weight_name])
            tensors.update(layer.merged_tensors(name))
        broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
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
    for_good: bool = False,
) -> None:
    """
    Merge adapters into the base weights of a model.

    Args:
        model: a model with adapter layers.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: refuse the whole merge, before anything is changed, if an entry would not be finite.
        progressbar: show progress.
        for_good: nobody will unmerge, so nothing is kept for it.
    """
    refuse_string(adapter_names)
    layers = [module for _, module in adapter_modules(model) if hasattr(module, "_merge_state")]
    _warn_if_merged(layers, adapter_names)
    _check_mergeable(layers, adapter_names)
    if safe_merge:
        check_merge_is_finite(layers, adapter_names)
    for sharing, holders in tqdm(layers_by_weight(model, layers), desc="merging", disable=not progressbar):
        merge_weight(sharing, adapter_names, holders, for_good)


def layers_by_weight(model: nn.Module, layers: Iterable["BaseTunerLayer"]) -> list[tuple[list["BaseTunerLayer"], int]]:
    """
    Put layers together that use one base weight.

    Args:
        model: the model that they are in.
        layers: adapter layers.

    Returns:
        For each weight its layers, and the number of modules that hold it, adapted or not.
    """
    holders = _holders(model)
    by_weight: dict[Hashable, list[BaseTunerLayer]] = {}
    for layer in layers:
        weight = layer.stored_weight()
        key = id(layer.get_base_layer()) if weight is None else identity_of(weight)
        by_weight.setdefault(key, []).append(layer)
    return [(sharing, holders.get(key, 1)) for key, sharing in by_weight.items()]


def merge_weight(
    layers: list["BaseTunerLayer"], adapter_names: Sequence[str] | None, holders: int, for_good: bool
) -> None:
    """Merge into one weight: in place if all its holders are adapted alike, into copies if they are not."""
    around: dict[tuple[int, str], list[BaseTunerLayer]] = {}
    for layer in reversed(layers):  # where several layers are around one base layer, the innermost comes first
        around.setdefault((id(layer.get_base_layer()), layer.weight_name), []).append(layer)
    parts: dict[tuple, tuple[list, list]] = {}
    anew = False
    for stack in reversed(around.values()):
        wanted = [(layer.source(name), name) for layer in stack for name in _wanted(layer, adapter_names)]
        merged = stack[0]._merge_state.contributions
        contributions = _from_inside(stack, dict.fromkeys([*merged, *wanted]))
        anew |= contributions[: len(merged)] != merged  # something comes before what is merged already
        key = tuple((id(source), name) for source, name in contributions)
        parts.setdefault(key, (contributions, []))[1].extend(stack)
    apart = len(parts) > 1 or len(around) < holders
    if apart or anew:  # what was merged in place for all of them may now belong to some only
        for layer in layers:
            unmerge_layer(layer)
    for contributions, sharing in parts.values():
        if contributions:
            _merge_sharing(sharing, contributions, apart, for_good)


def _from_inside(stack: Sequence["BaseTunerLayer"], contributions: Iterable["Contribution"]) -> list["Contribution"]:
    """Sort contributions by the place of their layer in a stack, of which the innermost layer comes first."""

    def place(contribution: "Contribution") -> int:
        source, name = contribution
        return next((i for i, layer in enumerate(stack) if layer.source(name) is source), 0)

    return sorted(contributions, key=place)


def _holders(model: nn.Module) -> dict[Hashable, int]:
    """Count for each parameter of the base model the places that hold it."""
    held = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(identity_of(parameter) for parameter in held if parameter is not None)
