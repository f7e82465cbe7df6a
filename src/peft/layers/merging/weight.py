# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""One base weight, be it that of several layers: which adapters are in it."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch

from .checks import wanted_adapters
from .mergeable_layer import MergeableLayer
from .order import in_order, mergeable_now
from .state import Contribution
from .tensors import merge_sharing, unmerge_all


def merge_weight(
    layers: list[MergeableLayer], adapter_names: Sequence[str] | None, holders: int, for_good: bool
) -> dict[Contribution, Contribution]:
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
    new = [(layer, name) for layer in layers for name in wanted_adapters(layer, adapter_names)]
    return add(layers, new, holders, for_good)


def add(
    layers: Iterable[MergeableLayer], new: Iterable[Contribution], holders: int, for_good: bool = False
) -> dict[Contribution, Contribution]:
    """Merge adapters into a weight that layers share; see `mergeable_now` for what is given back."""
    added: dict[int, list[Contribution]] = {}
    for contribution in new:
        added.setdefault(id(contribution[0]._merge_state), []).append(contribution)
    stacks, targets, waiting = by_state(layers), {}, {}
    for key, layer in stacks.items():
        state, new = layer._merge_state, added.get(key, [])
        wanted = [*state.contributions, *state.waiting, *new]
        targets[key], left = (in_order(wanted), {}) if for_good else mergeable_now(wanted)
        waiting[key] = left
    settle(stacks, targets, holders, for_good)
    return _note_waiting(stacks, waiting, {contribution for new in added.values() for contribution in new})


def take(
    layers: Sequence[MergeableLayer], holders: int, is_taken: Callable[[Contribution], bool]
) -> dict[Contribution, Contribution]:
    """Take adapters out of a weight that layers share, and what cannot be in it without them."""
    stacks, targets, waiting, merged = by_state(layers), {}, {}, set()
    for key, layer in stacks.items():
        state = layer._merge_state
        merged.update(state.contributions)
        left = [wanted for wanted in [*state.contributions, *state.waiting] if not is_taken(wanted)]
        targets[key], waiting[key] = mergeable_now(left)
    settle(stacks, targets, holders)
    return _note_waiting(stacks, waiting, merged)


def _note_waiting(
    stacks: Mapping[int, MergeableLayer],
    waiting: Mapping[int, Mapping[Contribution, Contribution]],
    asked: Collection[Contribution],
) -> dict[Contribution, Contribution]:
    """Keep in mind what waits; give back what does so from now on, although it was asked for, or was merged before."""
    new = {}
    for key, layer in stacks.items():
        layer._merge_state.waiting = list(waiting[key])
        new.update((contribution, other) for contribution, other in waiting[key].items() if contribution in asked)
    return new


def by_state(layers: Iterable[MergeableLayer]) -> dict[int, MergeableLayer]:
    """Give one layer around each base layer."""
    return {id(layer._merge_state): layer for layer in layers}


@torch.no_grad()
def settle(
    stacks: Mapping[int, MergeableLayer],
    targets: Mapping[int, Sequence[Contribution]],
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
    parts: dict[tuple, list[tuple[MergeableLayer, Sequence[Contribution]]]] = {}
    for key, layer in stacks.items():
        parts.setdefault(_identity(targets[key]), []).append((layer, targets[key]))
    apart = len(parts) > 1 or len(stacks) < holders
    if apart or not _continues(next(iter(parts.values()))):
        unmerge_all(stacks.values())
    for members in parts.values():
        if members[0][1]:
            merge_sharing(members, apart, for_good)


def _identity(contributions: Iterable[Contribution]) -> tuple:
    """Say which adapters' tensors are meant, whichever layers use them."""
    return tuple((id(layer.source(name)), name) for layer, name in contributions)


def _continues(members: Sequence[tuple[MergeableLayer, Sequence[Contribution]]]) -> bool:
    """Say whether layers that share a weight have merged alike so far, and there is only more to come."""
    return len({_identity(layer._merge_state.contributions) for layer, _ in members}) == 1 and all(
        target[: len(layer._merge_state.contributions)] == layer._merge_state.contributions
        for layer, target in members
    )
