# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merging adapters of single layers, and taking them out."""

from collections.abc import Iterable, Sequence

from .checks import check_merge_is_finite, check_mergeable, wanted_adapters, warn_if_off
from .mergeable_layer import MergeableLayer
from .order import warn_of_waiting
from .sharing import sharing_layers
from .state import Contribution
from .weight import add, take


def merge_layer(layer: MergeableLayer, adapter_names: Sequence[str] | None, safe_merge: bool = False) -> None:
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
    names = wanted_adapters(layer, adapter_names)
    check_mergeable([layer], names)
    if safe_merge:
        check_merge_is_finite([layer], names)
    layers, holders = sharing_layers(layer)
    waiting = add(layers, [(layer, name) for name in names], holders)
    warn_if_off([layer], names)
    warn_of_waiting(waiting)


def unmerge_layers(layers: Iterable[MergeableLayer]) -> None:
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
            waiting.update(take(sharing, holders, lambda contribution: id(contribution[0]) in wanted))
    warn_of_waiting(waiting)


def unmerge_layer(layer: MergeableLayer) -> None:
    """Take the merged adapters of one layer out of its base weight."""
    unmerge_layers([layer])


def take_adapter_out(layer: MergeableLayer, adapter_name: str) -> None:
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
        warn_of_waiting(
            take(layers, holders, lambda merged: merged[1] == adapter_name and merged[0].source(merged[1]) is source)
        )


def keep_order(layer: MergeableLayer) -> None:
    """
    Let what is merged wait for adapters that have become active, and be merged that has waited for others.

    Args:
        layer: the adapter layer.
    """
    layers, holders = sharing_layers(layer)
    warn_of_waiting(take(layers, holders, lambda merged: False))
