# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is refused, or warned of, before anything is merged."""

from collections.abc import Iterable, Sequence

import torch

from ...anatomy.offload import refuse_merge_into_offloaded
from ...utils.error import PeftRuntimeError, PeftTypeError, PeftValueError
from ...utils.warning import warn
from .mergeable_layer import MergeableLayer


def check_adapters_to_merge(module: MergeableLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
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
    warn_if_merged([module], wanted)
    return [name for name in wanted if name not in module.merged_adapters]


def refuse_string(adapter_names: Sequence[str] | None) -> None:
    """Raise if one name was given where a list of names belongs."""
    if isinstance(adapter_names, str):
        raise PeftTypeError(f"adapter_names must be a list of names, found the string {adapter_names!r}")


def wanted_adapters(layer: MergeableLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters to merge that this layer has."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if layer.has_adapter(name)]


def warn_if_merged(layers: Iterable[MergeableLayer], adapter_names: Sequence[str] | None) -> None:
    """Warn, once for all layers, about adapters that are merged already."""
    merged = {
        name: None
        for layer in layers
        if layer.merged
        for name in wanted_adapters(layer, adapter_names)
        if name in layer.merged_adapters
    }
    if merged:
        warn(f"already merged and left as they are: {', '.join(merged)}")


def warn_if_off(layers: Iterable[MergeableLayer], adapter_names: Sequence[str] | None) -> None:
    """Warn, once for all layers, about adapters that have been merged and count although they are switched off."""
    switched_off = (layer for layer in layers if layer.disable_adapters)
    wanted = ((layer.merged_adapters, wanted_adapters(layer, adapter_names)) for layer in switched_off)
    off = dict.fromkeys(name for merged, names in wanted for name in names if name in merged)  # others wait
    if off:
        warn(
            f"{', '.join(off)} is merged although adapters are switched off, and is part of the base weights; call "
            "unmerge_adapter() to take it out, or enable_adapter_layers() before merging if it shall count"
        )


def check_mergeable(layers: Iterable[MergeableLayer], adapter_names: Sequence[str] | None) -> None:
    """Refuse what cannot be merged, before anything is changed, and warn of weights that are rounded by it."""
    quantised: dict[str, None] = {}
    for layer in layers:
        base, backend = layer.get_base_layer(), layer.quantization_backend
        wanted = wanted_adapters(layer, adapter_names)
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
def _refuse_what_is_computed(layer: MergeableLayer, name: str) -> None:
    """Refuse a base weight that is computed from tensors that cannot stand for the merged one."""
    computed = layer.computed_weight()
    if computed is not None:
        weight, source = layer.get_base_weight().detach().clone(), layer.source(name)
        source.prepare_merge(name)
        source.merge_weight_(name, weight)
        computed.tensors_for(weight)


def _refuse_without_storage(layer: MergeableLayer, name: str) -> None:
    """Refuse adapters that were made on the meta device and got no values yet."""
    stored = layer.stored_weight()
    parameters = layer.source(name).adapter_parameters(name)
    if stored is not None and not stored.is_meta and any(parameter.is_meta for parameter in parameters):
        raise PeftRuntimeError(
            f"adapter {name!r} is on the meta device and has no content; an adapter that was made with "
            "low_cpu_mem_usage=True has to be loaded before it can be merged"
        )


@torch.no_grad()
def check_merge_is_finite(layers: Iterable[MergeableLayer], adapter_names: Sequence[str] | None) -> None:
    """
    Compute what merging would give, without changing a layer.

    Raises:
        PeftValueError: if an entry would not be finite.
    """
    for layer in layers:
        names = [name for name in wanted_adapters(layer, adapter_names) if name not in layer.merged_adapters]
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
