# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How the tensors of base layers change when adapters are merged and unmerged."""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...anatomy.offload import is_offloaded
from ...utils.same_tensor import identity_of
from ..undo import keep_values
from .mergeable_layer import MergeableLayer
from .state import Contribution, MergeState, holder


def merge_sharing(
    members: Sequence[tuple[MergeableLayer, Sequence[Contribution]]], apart: bool, for_good: bool
) -> None:
    """
    Merge adapters into a weight that layers share and that they shall go on sharing.

    Args:
        members: layers with one base weight, each with what is to be merged; the tensors are the same for all.
        apart: whether other modules hold the weight too and must not see a change.
        for_good: nobody will unmerge.
    """
    layers = [layer for layer, _ in members]
    first, everything = members[0]
    state, tensors_for = first._merge_state, _tensors_for(first)
    is_held = tensors_for is None
    # what is rounded each time that it is changed, or is not here, is merged anew, from the original
    needs_original = not is_held or not all(layer.source(name).can_unmerge(name) for layer, name in everything)
    copied = is_held and (apart or (needs_original and not for_good))
    not_replaced = not is_held or not state.replaces(first.weight_name)
    if state.contributions and (copied or needs_original) and not_replaced:
        unmerge_all(layers)
    done = len(state.contributions)
    if not done and copied:
        _replace_weight(layers)
    for _, target in members:
        for layer, name in target[done:]:
            layer.prepare_merge(name)
    weight = first.get_base_weight() if is_held else first.get_base_weight().detach().clone()
    if is_held:
        keep_values([weight])
    for place in range(done, len(everything)):
        layer, name = everything[place]
        layer.source(name).merge_weight_(name, weight)
        _merge_other_tensors([target[place] for _, target in members])
        for other, target in members:
            other._merge_state.contributions.append(target[place])
    if not is_held:
        _store(layers, tensors_for(weight), keep=apart or not for_good)


def _tensors_for(layer: MergeableLayer) -> Callable[[torch.Tensor], dict[str, Any]] | None:
    """Give what turns a weight into the tensors that the base layer has in its place; None if it holds the weight."""
    if not layer.changes_weight:
        return None
    backend, computed = layer.quantization_backend, layer.computed_weight()
    if backend is not None:
        return functools.partial(backend.requantize, layer.get_base_layer())
    if computed is not None:
        return computed.tensors_for
    return (lambda weight: {layer.weight_name: weight}) if is_offloaded(layer.get_base_layer()) else None


def _replace_weight(layers: Sequence[MergeableLayer]) -> None:
    """Give layers a copy of the weight that they share."""
    weight = layers[0].get_base_weight()
    copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for layer in layers:
        layer._merge_state.replace(layer.get_base_layer(), layer.weight_name, copied)


def _store(layers: Sequence[MergeableLayer], tensors: Mapping[str, Any], keep: bool) -> None:
    """Give what stands for a merged weight to the layers that share it; what they had can be kept."""
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        for layer in layers:
            module = layer.get_base_layer().get_submodule(path)
            present = holder(module, name)[name]
            if isinstance(present, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, present.requires_grad)
            if keep:
                layer._merge_state.replace(module, name, value, of=layer.weight_name if path else None)
            else:
                holder(module, name)[name] = value


def _merge_other_tensors(contributions: Iterable[Contribution]) -> None:
    """Replace what an adapter changes in base layers beside the weight; what they share, they go on sharing."""
    merged: dict[Hashable, torch.Tensor] = {}
    for layer, name in contributions:
        base = layer.get_base_layer()
        for tensor_key, value in layer.merged_tensors(name).items():
            path, _, tensor_name = tensor_key.rpartition(".")
            module = base.get_submodule(path)
            present = holder(module, tensor_name)[tensor_name]
            key = (id(module), tensor_name) if present is None else identity_of(present)
            if key not in merged:
                is_parameter = isinstance(present, nn.Parameter)
                merged[key] = nn.Parameter(value, present.requires_grad) if is_parameter else value
            layer._merge_state.replace(module, tensor_name, merged[key])


def unmerge_all(layers: Iterable[MergeableLayer]) -> None:
    """Take everything out of a weight, for layers of which each stands for those around its base layer."""
    layers = list(layers)
    in_place = [
        layer
        for layer in layers
        if layer._merge_state.contributions and not layer._merge_state.replaces(layer.weight_name)
    ]
    if in_place:
        weight = in_place[0].get_base_weight()
        keep_values([weight])
        undo_merge(in_place[0], weight, [layer._merge_state for layer in in_place])
    for layer in layers:
        layer._merge_state.restore()


def undo_merge(layer: MergeableLayer, weight: torch.Tensor, states: Iterable[MergeState] = ()) -> None:
    """
    Take what was merged in place out of a weight, the last merged adapter first.

    Args:
        layer: one of the layers around a base layer.
        weight: the base weight, or a copy of it.
        states: states to keep up to date: what is still merged if this fails on the way.
    """
    for user, name in reversed(layer._merge_state.contributions.copy()):
        user.source(name).unmerge_weight_(name, weight)
        for state in states:
            state.contributions.pop()
