# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merging the adapters of a whole model."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from .checks import check_merge_is_finite, check_mergeable, refuse_string, warn_if_merged, warn_if_off
from .mergeable_layer import MergeableLayer
from .order import warn_of_waiting
from .sharing import layers_by_weight, merging_layers
from .state import Contribution
from .weight import merge_weight


_PACKAGE = __name__.partition(".")[0]


def call_replaced(layers: Iterable[MergeableLayer], name: str, **arguments: Any) -> list[MergeableLayer]:
    """
    Call what clients have put in the place of a method of layers, which decides what is done with them.

    Args:
        layers: adapter layers.
        name: "merge" or "unmerge".
        arguments: for it.

    Returns:
        The layers of which it is this package's own; nothing is called for them.
    """
    own = []
    for layer in layers:
        method = getattr(layer, name)
        if getattr(method, "__func__", method).__module__.partition(".")[0] == _PACKAGE:
            own.append(layer)
        else:
            method(**arguments)
    return own


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
    warn_if_merged(layers, adapter_names)
    check_mergeable(layers, adapter_names)
    if safe_merge:
        check_merge_is_finite(layers, adapter_names)
    layers = call_replaced(layers, "merge", safe_merge=safe_merge, adapter_names=adapter_names)
    waiting: dict[Contribution, Contribution] = {}
    for sharing, holders in tqdm(layers_by_weight(model, layers), desc="merging", disable=not progressbar):
        waiting.update(merge_weight(sharing, adapter_names, holders, for_good))
    if not for_good:
        warn_if_off(layers, adapter_names)
    warn_of_waiting(waiting)
