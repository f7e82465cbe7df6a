# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Changing an adapter that is merged: its part of the weight follows."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .mergeable_layer import MergeableLayer
from .sharing import sharing_layers
from .state import Contribution
from .weight import by_state, settle


@contextmanager
def taken_out(layers: Iterable[MergeableLayer], adapter_name: str) -> Iterator[None]:
    """
    Take an adapter out of base weights while its tensors or settings change, and merge it again after that.

    Args:
        layers: layers that have the adapter.
        adapter_name: its name; nothing happens where it is not merged.
    """
    before: list[tuple[dict[int, MergeableLayer], dict[int, list[Contribution]], int]] = []
    for layer in layers:
        sharing, holders = sharing_layers(layer)
        stacks = by_state(sharing)
        targets = {key: list(stack._merge_state.contributions) for key, stack in stacks.items()}
        if any(name == adapter_name for target in targets.values() for _, name in target):
            before.append((stacks, targets, holders))
            settle(stacks, {key: [] for key in stacks}, holders)
    try:
        yield
    finally:
        for stacks, targets, holders in before:
            still = {key: [c for c in target if c[0].has_adapter(c[1])] for key, target in targets.items()}
            settle(stacks, still, holders)


def changes_adapter(method: Callable) -> Callable:
    """
    Let a method that changes tensors or settings of an adapter find it unmerged; afterwards it is merged again.

    Args:
        method: method of a layer, whose first argument is the adapter's name.
    """
    first = list(inspect.signature(method).parameters)[1]

    @functools.wraps(method)
    def with_adapter_taken_out(layer: MergeableLayer, *args: Any, **kwargs: Any) -> Any:
        if layer._sharing is None and not layer._merge_state.contributions:  # as new layers are
            return method(layer, *args, **kwargs)
        with taken_out([layer], args[0] if args else kwargs[first]):
            return method(layer, *args, **kwargs)

    return with_adapter_taken_out
