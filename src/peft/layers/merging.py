# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merging adapters into base weights and taking them out again.

What counts is the base parameter, not the layer: a parameter that several layers share is visited once.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from ..anatomy.offload import Replacements, is_offloaded, refuse_merge_into_offloaded
from ..anatomy.walking import adapter_modules, base_modules
from ..surgery.transaction import keep_values
from ..utils.error import PeftRuntimeError, PeftTypeError, PeftValueError
from ..utils.same_tensor import identity_of
from ..utils.warning import warn


if TYPE_CHECKING:
    from ..tuners.base import BaseTunerLayer

    Contribution = tuple["BaseTunerLayer", str]


@dataclass
class Original:
    """
    A tensor of the base model in whose place a module holds another one while something is merged.

    Quantised layers also have attributes that go with the tensor.

    Attributes:
        module: the module.
        name: the tensor's name there.
        tensor: the one that does not stand there at the moment.
        of: attribute of the base layer whose value it is, or is computed from.
    """

    module: nn.Module
    name: str
    tensor: torch.Tensor | None
    of: str

    def swap(self) -> None:
        """Exchange the tensor with the one that the module holds."""
        held = _holder(self.module, self.name)
        held[self.name], self.tensor = self.tensor, held[self.name]


@dataclass
class MergeState:
    """
    What is merged into the weight of one base layer. The layers around it share this object.

    Attributes:
        contributions: a layer around the base layer and the adapter's name, in the order of merging. The adapter's
            tensors may be those of an owner that the layer follows.
        originals: tensors of the base model that were replaced, not changed in place: because other modules that were
            not merged alike hold them too, or because there is no way back.
        waiting: what shall be merged as soon as another adapter is, on whose result it works.
    """

    contributions: list["Contribution"] = field(default_factory=list)
    waiting: list["Contribution"] = field(default_factory=list)
    originals: list[Original] = field(default_factory=list)

    def replaces(self, name: str) -> bool:
        """Say whether a tensor of that name was replaced."""
        return any(original.of == name for original in self.originals)

    def replace(self, module: nn.Module, name: str, tensor: torch.Tensor, of: str | None = None) -> None:
        """Put a tensor into a module of the base model; what stood there at first is kept."""
        held = _holder(module, name)
        if not any(original.module is module and original.name == name for original in self.originals):
            self.originals.append(Original(module, name, held[name], of or name))
        held[name] = tensor

    def restore(self) -> None:
        """Put all tensors back that were replaced; nothing is merged any more."""
        for original in self.originals:
            original.swap()
        self.originals.clear()
        self.contributions.clear()

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        Move or cast the tensors that were replaced along with the model.

        Args:
            function: what `torch.nn.Module._apply` is given. It may see a tensor twice, as that of a module would.
        """
        for original in self.originals:
            if isinstance(original.tensor, torch.Tensor):
                original.tensor = _converted(original.tensor, function)


def _converted(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Convert a tensor; a parameter stays the object that others may hold, where torch can do that."""
    with torch.no_grad():
        new = function(tensor)
    if new is tensor or not isinstance(tensor, nn.Parameter):
        return new
    if torch._has_compatible_shallow_copy_type(tensor, new):
        tensor.data = new
        return tensor
    return nn.Parameter(new, tensor.requires_grad) if type(tensor) is nn.Parameter else new


@dataclass
class Sharing:
    """
    Who holds a parameter of the base model that stands in several places.

    Attributes:
        layers: the adapter layers around modules that hold it.
        places: all modules of the base model that hold it, with its name there.
    """

    layers: list["BaseTunerLayer"]
    places: list[tuple[nn.Module, str]]


def _holder(module: nn.Module, name: str) -> dict[str, torch.Tensor | None] | Replacements:
    holders = (module._parameters, module._buffers, module.__dict__)
    held = next(held for held in holders if name in held)
    # a placeholder stays where it is, and what it stands for is replaced
    return Replacements(module) if getattr(held[name], "is_meta", False) and is_offloaded(module) else held


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


def _warn_if_off(layers: Iterable["BaseTunerLayer"], adapter_names: Sequence[str] | None) -> None:
    """Warn, once for all layers, about adapters that are switched off and count as soon as they are merged."""
    off = dict.fromkeys(name for layer in layers if layer.disable_adapters for name in _wanted(layer, adapter_names))
    if off:
        warn(
            f"{', '.join(off)} is merged although adapters are switched off, and is part of the base weights; call "
            "unmerge_adapter() to take it out, or enable_adapter_layers() before merging if it shall count"
        )


def _wanted(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge that this layer has."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if layer.has_adapter(name)]


def merge_layer(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None, safe_merge: bool = False) -> None:
    """
    Merge adapters into the base weight of one layer; those that are merged already are left as they are.

    Other modules that hold the weight keep it: the layer has a copy of its own, until all of them are merged alike.

    Args:
        layer: the adapter layer.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: compute the merged tensors apart first, and refuse them if an entry is not finite.

    Raises:
        PeftValueError: if `safe_merge` finds entries that are not finite; the layer stays as it was.
    """
    names = _wanted(layer, adapter_names)
    _warn_if_off([layer], names)
    _check_mergeable([layer], names)
    if safe_merge:
        check_merge_is_finite([layer], names)
    layers, holders = sharing_layers(layer)
    _warn_of_waiting(_add(layers, [(layer, name) for name in names], holders))


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
            _refuse_without_storage(layer, name)
            layer.check_mergeable(name)
            _refuse_what_is_computed(layer, name)
            if backend is not None:
                refuse_merge_into_offloaded(base)
                backend.check_mergeable(base)
                quantised[backend.name] = None
    if quantised:
        warn(
            f"merging into weights that are quantised ({', '.join(quantised)}) rounds them anew, so outputs differ a "
            "little from those of the adapter beside the weights; unmerging brings the weights back as they were"
        )


@torch.no_grad()
def _refuse_what_is_computed(layer: "BaseTunerLayer", name: str) -> None:
    """Refuse a base weight that is computed from tensors that cannot stand for the merged one."""
    computed = layer.computed_weight()
    if computed is not None:
        weight, source = layer.get_base_weight().detach().clone(), layer.source(name)
        source.prepare_merge(name)
        source.merge_weight_(name, weight)
        computed.tensors_for(weight)


def _refuse_without_storage(layer: "BaseTunerLayer", name: str) -> None:
    """Refuse adapters that were made on the meta device and got no values yet."""
    stored = layer.stored_weight()
    parameters = layer.source(name).adapter_parameters(name)
    if stored is not None and not stored.is_meta and any(parameter.is_meta for parameter in parameters):
        raise PeftRuntimeError(
            f"adapter {name!r} is on the meta device and has no content; an adapter that was made with "
            "low_cpu_mem_usage=True has to be loaded before it can be merged"
        )


# ------------------------------------------------------------------------------------------ who shares a weight
def note_sharing(model: nn.Module) -> None:
    """
    Tell the adapter layers of a model who else holds their base weights.

    One layer can then be merged by itself, and share its weight again as soon as the others are merged alike.

    Args:
        model: a model with adapter layers.
    """
    layers = merging_layers(model)
    with original_weights(layers):
        counts = _holders(model)
        sharing = {key: Sharing([], []) for key, count in counts.items() if count > 1}
        for module in base_modules(model) if sharing else ():
            for name, parameter in module._parameters.items():
                if parameter is not None and (key := identity_of(parameter)) in sharing:
                    sharing[key].places.append((module, name))
        for layer in layers:
            shared = sharing.get(_weight_key(layer)) if sharing else None
            layer.__dict__["_sharing"] = shared
            if shared is not None:
                shared.layers.append(layer)


def sharing_layers(layer: "BaseTunerLayer") -> tuple[list["BaseTunerLayer"], int]:
    """
    Find the layers whose base weight is that of a layer, or would be if nothing were merged.

    Returns:
        The layers, this one among them, and the number of modules that hold the weight, adapted or not.
    """
    sharing = layer._sharing
    if sharing is None:
        return [layer], 1
    with original_weights(sharing.layers):  # ties may have been made and cut since the layers were told
        key = _weight_key(layer)
        layers = [other for other in sharing.layers if _weight_key(other) == key]
        held = (module._parameters.get(name) for module, name in sharing.places)
        holders = sum(parameter is not None and identity_of(parameter) == key for parameter in held)
    return (layers, holders) if layer in layers else ([layer], 1)


def _weight_key(layer: "BaseTunerLayer") -> Hashable:
    """Identify the weight of a layer; the layer of the base model stands for one that holds no such tensor."""
    base = layer.get_base_layer()
    held = next((h[layer.weight_name] for h in (base._parameters, base._buffers) if layer.weight_name in h), None)
    return id(base) if held is None else identity_of(held)


def merging_layers(model: nn.Module) -> list["BaseTunerLayer"]:
    """List the adapter layers of a model whose adapters can be merged."""
    return [module for _, module in adapter_modules(model) if hasattr(module, "_merge_state")]


# ------------------------------------------------------------------------------------------ what is to be merged
def _by_state(layers: Iterable["BaseTunerLayer"]) -> dict[int, "BaseTunerLayer"]:
    """Give one layer around each base layer."""
    return {id(layer._merge_state): layer for layer in layers}


def _inside(layer: "BaseTunerLayer") -> Iterator["BaseTunerLayer"]:
    """Yield the adapter layers between a layer and its base layer that adapt the same weight."""
    inner = layer.base_layer
    while hasattr(inner, "_merge_state"):
        if inner.weight_name == layer.weight_name:
            yield inner
        inner = inner.base_layer


def _in_order(contributions: Iterable["Contribution"]) -> list["Contribution"]:
    """
    Sort contributions as a forward pass meets them: from inside, and in a layer in the order of activation.

    Adapters that are not active stay where they are.
    """
    by_layer: dict[int, list[Contribution]] = {}
    for contribution in dict.fromkeys(contributions):
        by_layer.setdefault(id(contribution[0]), []).append(contribution)
    result: list[Contribution] = []
    for stack in sorted(by_layer.values(), key=lambda held: sum(1 for _ in _inside(held[0][0]))):
        layer, names = stack[0][0], [name for _, name in stack]
        in_turn = iter([(layer, name) for name in layer.active_adapters if name in names])
        result += [next(in_turn) if name in layer.active_adapters else (layer, name) for name in names]
    return result


def _before(contribution: "Contribution") -> Iterator["Contribution"]:
    """Yield the adapters whose part of the forward pass comes before that of an adapter."""
    layer, name = contribution
    for inner in _inside(layer):
        if not inner.disable_adapters:
            yield from ((inner, other) for other in inner.active_adapters if inner.has_adapter(other))
    if name in layer.active_adapters:
        earlier = layer.active_adapters[: layer.active_adapters.index(name)]
        yield from ((layer, other) for other in earlier if layer.has_adapter(other))


def _waits_for(contribution: "Contribution", merged: Collection["Contribution"]) -> "Contribution | None":
    """Find an adapter that has to be merged before another one can be, since the order of the two matters."""
    layer, name = contribution
    for other in _before(contribution):
        if other not in merged and not layer.commutes_with(name, *other):
            return other
    return None


def _mergeable_now(
    contributions: Iterable["Contribution"],
) -> tuple[list["Contribution"], dict["Contribution", "Contribution"]]:
    """
    Choose what can be in the weight while active adapters that are not merged go on computing.

    Returns:
        What is to be merged, in order; and what has to stay beside the weight, with the adapter that it waits for.
    """
    merged: list[Contribution] = []
    waiting: dict[Contribution, Contribution] = {}
    for contribution in _in_order(contributions):
        other = _waits_for(contribution, merged)
        if other is None:
            merged.append(contribution)
        else:
            waiting[contribution] = other
    return merged, waiting


def _warn_of_waiting(waiting: Mapping["Contribution", "Contribution"]) -> None:
    """Warn, once for all layers, about adapters that stay beside the weight."""
    pairs = dict.fromkeys((name, other) for (_, name), (_, other) in waiting.items())
    if pairs:
        found = "; ".join(f"{name!r} works on what {other!r} leaves" for name, other in pairs)
        warn(
            f"not merged in {len(waiting)} layers, so that outputs stay what they are: {found}, which is active and "
            "not merged. Merge that one too, and both will be, or deactivate it first"
        )


def _add(
    layers: Iterable["BaseTunerLayer"], new: Iterable["Contribution"], holders: int, for_good: bool = False
) -> dict["Contribution", "Contribution"]:
    """Merge adapters into a weight that layers share; see `_mergeable_now` for what is given back."""
    added: dict[int, list[Contribution]] = {}
    for contribution in new:
        added.setdefault(id(contribution[0]._merge_state), []).append(contribution)
    stacks, targets, waiting = _by_state(layers), {}, {}
    for key, layer in stacks.items():
        state, new = layer._merge_state, added.get(key, [])
        wanted = [*state.contributions, *state.waiting, *new]
        targets[key], left = (_in_order(wanted), {}) if for_good else _mergeable_now(wanted)
        waiting[key] = left
    _settle(stacks, targets, holders, for_good)
    return _note_waiting(stacks, waiting, {contribution for new in added.values() for contribution in new})


def _note_waiting(
    stacks: Mapping[int, "BaseTunerLayer"],
    waiting: Mapping[int, Mapping["Contribution", "Contribution"]],
    asked: Collection["Contribution"],
) -> dict["Contribution", "Contribution"]:
    """Keep in mind what waits; give back what does so from now on, although it was asked for, or was merged before."""
    new = {}
    for key, layer in stacks.items():
        layer._merge_state.waiting = list(waiting[key])
        new.update((contribution, other) for contribution, other in waiting[key].items() if contribution in asked)
    return new


def _take(
    layers: Sequence["BaseTunerLayer"], holders: int, is_taken: Callable[["Contribution"], bool]
) -> dict["Contribution", "Contribution"]:
    """Take adapters out of a weight that layers share, and what cannot be in it without them."""
    stacks, targets, waiting, merged = _by_state(layers), {}, {}, set()
    for key, layer in stacks.items():
        state = layer._merge_state
        merged.update(state.contributions)
        left = [wanted for wanted in [*state.contributions, *state.waiting] if not is_taken(wanted)]
        targets[key], waiting[key] = _mergeable_now(left)
    _settle(stacks, targets, holders)
    return _note_waiting(stacks, waiting, merged)


# ------------------------------------------------------------------------------------------ merging it
@torch.no_grad()
def _settle(
    stacks: Mapping[int, "BaseTunerLayer"],
    targets: Mapping[int, Sequence["Contribution"]],
    holders: int,
    for_good: bool = False,
) -> None:
    """
    Let exactly these adapters be merged into a weight, in place if all its holders are alike, into copies if not.

    Args:
        stacks: id of a state -> one of the layers around that base layer.
        targets: id of a state -> what is to be merged, in order.
        holders: number of modules that hold the weight, adapted or not.
        for_good: nobody will unmerge.
    """
    if all(layer._merge_state.contributions == targets[key] for key, layer in stacks.items()):
        return
    parts: dict[tuple, list[tuple[BaseTunerLayer, Sequence[Contribution]]]] = {}
    for key, layer in stacks.items():
        parts.setdefault(_identity(targets[key]), []).append((layer, targets[key]))
    apart = len(parts) > 1 or len(stacks) < holders
    if apart or not _continues(next(iter(parts.values()))):
        _unmerge_all(stacks.values())
    for members in parts.values():
        if members[0][1]:
            _merge_sharing(members, apart, for_good)


def _identity(contributions: Iterable["Contribution"]) -> tuple:
    """Say which adapters' tensors are meant, whichever layers use them."""
    return tuple((id(layer.source(name)), name) for layer, name in contributions)


def _continues(members: Sequence[tuple["BaseTunerLayer", Sequence["Contribution"]]]) -> bool:
    """Say whether layers that share a weight have merged alike so far, and there is only more to come."""
    return len({_identity(layer._merge_state.contributions) for layer, _ in members}) == 1 and all(
        target[: len(layer._merge_state.contributions)] == layer._merge_state.contributions
        for layer, target in members
    )


def _merge_sharing(
    members: Sequence[tuple["BaseTunerLayer", Sequence["Contribution"]]], apart: bool, for_good: bool
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
        _unmerge_all(layers)
    done = len(state.contributions)
    if not done and copied:
        _replace_weight(layers)
    for layer, name in everything[done:]:
        layer.source(name).prepare_merge(name)
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


def _tensors_for(layer: "BaseTunerLayer") -> Callable[[torch.Tensor], dict[str, Any]] | None:
    """Give what turns a weight into the tensors that the base layer has in its place; None if it holds the weight."""
    if not layer.changes_weight:
        return None
    backend, computed = layer.quantization_backend, layer.computed_weight()
    if backend is not None:
        return functools.partial(backend.requantize, layer.get_base_layer())
    if computed is not None:
        return computed.tensors_for
    return (lambda weight: {layer.weight_name: weight}) if is_offloaded(layer.get_base_layer()) else None


def _replace_weight(layers: Sequence["BaseTunerLayer"]) -> None:
    """Give layers a copy of the weight that they share."""
    weight = layers[0].get_base_weight()
    copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for layer in layers:
        layer._merge_state.replace(layer.get_base_layer(), layer.weight_name, copied)


def _store(layers: Sequence["BaseTunerLayer"], tensors: Mapping[str, Any], keep: bool) -> None:
    """Give what stands for a merged weight to the layers that share it; what they had can be kept."""
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        for layer in layers:
            module = layer.get_base_layer().get_submodule(path)
            present = _holder(module, name)[name]
            if isinstance(present, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, present.requires_grad)
            if keep:
                layer._merge_state.replace(module, name, value, of=layer.weight_name if path else None)
            else:
                _holder(module, name)[name] = value


def _merge_other_tensors(contributions: Iterable["Contribution"]) -> None:
    """Replace what an adapter changes in base layers beside the weight; what they share, they go on sharing."""
    merged: dict[Hashable, torch.Tensor] = {}
    for layer, name in contributions:
        base = layer.get_base_layer()
        for tensor_key, value in layer.merged_tensors(name).items():
            path, _, tensor_name = tensor_key.rpartition(".")
            module = base.get_submodule(path)
            present = _holder(module, tensor_name)[tensor_name]
            key = (id(module), tensor_name) if present is None else identity_of(present)
            if key not in merged:
                is_parameter = isinstance(present, nn.Parameter)
                merged[key] = nn.Parameter(value, present.requires_grad) if is_parameter else value
            layer._merge_state.replace(module, tensor_name, merged[key])


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


# ------------------------------------------------------------------------------------------ unmerging it
def _unmerge_all(layers: Iterable["BaseTunerLayer"]) -> None:
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


def undo_merge(layer: "BaseTunerLayer", weight: torch.Tensor, states: Iterable[MergeState] = ()) -> None:
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


def unmerge_layers(layers: Iterable["BaseTunerLayer"]) -> None:
    """
    Take the merged adapters of layers out of their base weights. Other layers that share a weight stay merged.

    Args:
        layers: adapter layers.
    """
    wanted = {id(layer): layer for layer in layers if layer.merged or layer._merge_state.waiting}
    waiting: dict[Contribution, Contribution] = {}
    for layer in wanted.values():
        if layer.merged or layer._merge_state.waiting:  # or another one that shares the weight has come before
            sharing, holders = sharing_layers(layer)
            waiting.update(_take(sharing, holders, lambda contribution: id(contribution[0]) in wanted))
    _warn_of_waiting(waiting)


def unmerge_layer(layer: "BaseTunerLayer") -> None:
    """Take the merged adapters of one layer out of its base weight."""
    unmerge_layers([layer])


def take_adapter_out(layer: "BaseTunerLayer", adapter_name: str) -> None:
    """
    Take one adapter out of the weights of a layer and of those that share its base weight.

    Args:
        layer: the adapter layer.
        adapter_name: name of an adapter, merged or not.
    """
    layers, holders = sharing_layers(layer)
    wanted = [c for other in layers for c in (*other._merge_state.contributions, *other._merge_state.waiting)]
    if any(name == adapter_name for _, name in wanted):
        source = layer.source(adapter_name)
        _warn_of_waiting(
            _take(layers, holders, lambda merged: merged[1] == adapter_name and merged[0].source(merged[1]) is source)
        )


@contextmanager
def taken_out(layers: Iterable["BaseTunerLayer"], adapter_name: str) -> Iterator[None]:
    """
    Take an adapter out of base weights while its tensors or settings change, and merge it again after that.

    Args:
        layers: layers that have the adapter.
        adapter_name: its name; nothing happens where it is not merged.
    """
    before: list[tuple[dict[int, BaseTunerLayer], dict[int, list[Contribution]], int]] = []
    for layer in layers:
        sharing, holders = sharing_layers(layer)
        stacks = _by_state(sharing)
        targets = {key: list(stack._merge_state.contributions) for key, stack in stacks.items()}
        if any(name == adapter_name for target in targets.values() for _, name in target):
            before.append((stacks, targets, holders))
            _settle(stacks, {key: [] for key in stacks}, holders)
    try:
        yield
    finally:
        for stacks, targets, holders in before:
            still = {key: [c for c in target if c[0].has_adapter(c[1])] for key, target in targets.items()}
            _settle(stacks, still, holders)


def changes_adapter(method: Callable) -> Callable:
    """
    Let a method that changes tensors or settings of an adapter find it unmerged; afterwards it is merged again.

    Args:
        method: method of a layer, whose first argument is the adapter's name.
    """
    first = list(inspect.signature(method).parameters)[1]

    @functools.wraps(method)
    def with_adapter_taken_out(layer: "BaseTunerLayer", *args: Any, **kwargs: Any) -> Any:
        with taken_out([layer], args[0] if args else kwargs[first]):
            return method(layer, *args, **kwargs)

    return with_adapter_taken_out


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
    layers = merging_layers(model)
    _warn_if_merged(layers, adapter_names)
    if not for_good:
        _warn_if_off(layers, adapter_names)
    _check_mergeable(layers, adapter_names)
    if safe_merge:
        check_merge_is_finite(layers, adapter_names)
    waiting: dict[Contribution, Contribution] = {}
    for sharing, holders in tqdm(layers_by_weight(model, layers), desc="merging", disable=not progressbar):
        waiting.update(merge_weight(sharing, adapter_names, holders, for_good))
    _warn_of_waiting(waiting)


def layers_by_weight(model: nn.Module, layers: Iterable["BaseTunerLayer"]) -> list[tuple[list["BaseTunerLayer"], int]]:
    """
    Put layers together that use one base weight.

    Args:
        model: the model that they are in.
        layers: adapter layers.

    Returns:
        For each weight its layers, and the number of modules that hold it, adapted or not.
    """
    layers = list(layers)
    by_weight: dict[Hashable, list[BaseTunerLayer]] = {}
    with original_weights(layers):  # a layer that was merged by itself has a copy
        holders = _holders(model)
        for layer in layers:
            by_weight.setdefault(_weight_key(layer), []).append(layer)
    return [(sharing, holders.get(key, 1)) for key, sharing in by_weight.items()]


def merge_weight(
    layers: list["BaseTunerLayer"], adapter_names: Sequence[str] | None, holders: int, for_good: bool
) -> dict["Contribution", "Contribution"]:
    """
    Merge into one weight: in place if all its holders are adapted alike, into copies if they are not.

    Args:
        layers: the layers that use it.
        adapter_names: which adapters; the active ones if left out.
        holders: number of modules that hold the weight, adapted or not.
        for_good: nobody will unmerge.

    Returns:
        What is not merged, and what it waits for.
    """
    new = [(layer, name) for layer in layers for name in _wanted(layer, adapter_names)]
    return _add(layers, new, holders, for_good)


def _holders(model: nn.Module) -> dict[Hashable, int]:
    """Count for each parameter of the base model the places that hold it."""
    held = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(identity_of(parameter) for parameter in held if parameter is not None)
