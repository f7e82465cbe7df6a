# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merging adapters into base weights and taking them out again."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..utils.error import PeftValueError
from ..utils.warning import warn


if TYPE_CHECKING:
    from .tuners_utils import BaseTunerLayer


def check_adapters_to_merge(module: "BaseTunerLayer", adapter_names: Sequence[str] | None = None) -> list[str]:
    """
    Find which adapters of a layer are to be merged now.

    Args:
        module: an adapter layer.
        adapter_names: names to merge; the active ones if left out.

    Returns:
        Those names that are not merged yet, in order. Names that are merged already cause a warning.
    """
    if isinstance(adapter_names, str):
        raise PeftValueError(f"adapter_names must be a list of names, found the string {adapter_names!r}")
    wanted = list(module.active_adapters if adapter_names is None else adapter_names)
    _warn_if_merged([module], wanted)
    return [name for name in wanted if name not in module.merged_adapters]


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


@torch.no_grad()
def merge_layer(layer: "BaseTunerLayer", adapter_names: Sequence[str] | None, safe_merge: bool = False) -> None:
    """
    Merge adapters into the base weight of one layer; those that are merged already are left as they are.

    Args:
        layer: the adapter layer.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: compute the merged tensors apart first, and refuse them if an entry is not finite.

    Raises:
        PeftValueError: if `safe_merge` finds entries that are not finite; the layer stays as it was.
    """
    names = [name for name in _wanted(layer, adapter_names) if name not in layer.merged_adapters]
    for name in names:
        layer.check_mergeable(name)
    if safe_merge:
        check_merge_is_finite([layer], names)
    tensors = layer.base_tensors()
    for name in names:
        layer.merge_into(name, tensors)
        layer.merged_adapters.append(name)


@torch.no_grad()
def unmerge_layer(layer: "BaseTunerLayer") -> None:
    """Take merged adapters out of the base weight of one layer, the last merged one first."""
    tensors = layer.base_tensors()
    while layer.merged_adapters:
        layer.unmerge_from(layer.merged_adapters.pop(), tensors)


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
        trial = {key: tensor.clone() for key, tensor in layer.base_tensors().items()}
        for name in names:
            layer.merge_into(name, trial)
        broken = [key for key, tensor in trial.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise PeftValueError(
                f"merging {', '.join(names)} would give entries that are not finite in the {' and '.join(broken)} of "
                f"a {type(layer.get_base_layer()).__name__} layer; nothing was merged. The adapter has probably "
                "diverged in training: go back to an earlier checkpoint"
            )


def merge_layers(
    layers: Sequence["BaseTunerLayer"],
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
) -> None:
    """
    Merge adapters into the base weights of a model.

    Args:
        layers: adapter layers.
        adapter_names: which adapters; the active ones if left out.
        safe_merge: refuse the whole merge, before anything is changed, if an entry would not be finite.
        progressbar: show progress.
    """
    _warn_if_merged(layers, adapter_names)
    for layer in layers:
        for name in _wanted(layer, adapter_names):
            layer.check_mergeable(name)
    if safe_merge:
        check_merge_is_finite(layers, adapter_names)
    for layer in tqdm(layers, desc="merging", disable=not progressbar):
        merge_layer(layer, adapter_names)
