# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Giving the components that EVA has found to the layers of an adapter: ranks, factors, config."""

from collections.abc import Mapping

import torch
from torch import nn

from ....anatomy.matching import shortest_endings
from ....anatomy.walking import adapter_modules, names_of_modules
from ....layers.merging.sharing import note_sharing
from ....layers.new_tensors import making_tensors
from ....surgery.switching import remove_empty_layers
from ....surgery.transaction import all_or_nothing
from ....utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from ....utils.error import PeftValueError
from ....utils.near_names import FEW
from ....utils.warning import warn
from ..config import LoraConfig
from ..layer import Linear, LoraLayer


# what `PeftModel` and `LoraModel` put before the names of modules
_WRAPPERS = "base_model.model."


def own_layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """
    List the layers that have factors of an adapter themselves, and do not follow others.

    Args:
        model: a `PeftModel`.
        adapter: name.

    Returns:
        Name in this model -> layer, in its order.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.has_adapter(adapter) and layer.source(adapter) is layer
    }


def write_components(model: nn.Module, adapter: str, config: LoraConfig, found: Mapping[str, torch.Tensor]) -> None:
    """
    Give each layer of an adapter the rank and the factor A that were found for it.

    Args:
        model: a `PeftModel`.
        adapter: name of the adapter.
        config: its config, with its `eva_config`.
        found: name of a layer, with or without the names of the wrappers -> (rank, in).

    Raises:
        PeftValueError: if that does not fit the layers, or the adapter is merged. Nothing is changed then.
    """
    layers = own_layers(model, adapter)
    components = _matched(layers, found)
    merged = [name for name, layer in layers.items() if adapter in layer.merged_adapters]
    if merged:
        raise PeftValueError(
            f"adapter {adapter!r} is merged ({', '.join(merged[:FEW])}), so its factors cannot be started; call "
            "unmerge_adapter() first"
        )
    adjust = config.eva_config.adjust_scaling_factors
    with all_or_nothing(model), torch.no_grad():
        for name, rows in components.items():
            if len(rows):
                _write(layers[name], adapter, config, rows, adjust)
        _start_others({n: layer for n, layer in layers.items() if n not in components}, adapter, config)
        _take_out(model, adapter, [layers[name] for name, rows in components.items() if not len(rows)])
        kept = [name for name, rows in components.items() if len(rows)]
        kept += [name for name in layers if name not in components]
        _describe(model, adapter, {name.removeprefix(_WRAPPERS): layers[name] for name in kept})


def _matched(layers: Mapping[str, LoraLayer], found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Find the layers of what was found, and refuse what does not fit them."""
    names = {name.removeprefix(_WRAPPERS): name for name in layers}
    components = {}
    for key, rows in found.items():
        name = names.get(key.removeprefix(_WRAPPERS))
        if name is None:
            continue
        layer = layers[name]
        if not isinstance(layer, Linear) or rows.dim() != 2 or rows.shape[1] != layer.in_features:
            raise PeftValueError(
                f"eva_state_dict holds a tensor of shape {tuple(rows.shape)} for {name!r}, a {type(layer).__name__} "
                f"with {layer.in_features} inputs; it must be (rank, inputs) of a linear layer"
            )
        if not rows.isfinite().all():
            raise PeftValueError(f"eva_state_dict holds nan or infinite entries for {name!r}; compute it again")
        components[name] = rows
    if not components:
        named, own = (", ".join(map(repr, list(those)[:FEW])) for those in (found, layers))
        raise PeftValueError(f"eva_state_dict names no layer of the adapter: found {named or 'none'}, expected {own}")
    return components


def _write(layer: LoraLayer, adapter: str, config: LoraConfig, rows: torch.Tensor, adjust: bool) -> None:
    rank = len(rows)
    into, out = layer.factor_weights(adapter)
    if rank != layer.r[adapter] or into.is_meta:
        alpha = layer.lora_alpha[adapter]
        if adjust:
            alpha = alpha * rank / layer.r[adapter]
        _make_anew(layer, adapter, config, rank, alpha)
        into, out = layer.factor_weights(adapter)
    into.copy_(rows)
    out.zero_()


def _make_anew(layer: LoraLayer, adapter: str, config: LoraConfig, rank: int, alpha: float) -> None:
    """Make an adapter's tensors in another rank, as the old ones were otherwise."""
    old, _ = layer.factor_weights(adapter)
    trained = adapter in layer._trainable_adapters
    wants_grad = any(parameter.requires_grad for parameter in layer.adapter_parameters(adapter))
    with making_tensors(full_precision=old.dtype.itemsize > 2):
        layer.update_layer(adapter, rank, alpha, config=config)
    layer.train(layer.training)
    layer.set_requires_grad([adapter], wants_grad)
    if trained:
        layer._trainable_adapters.add(adapter)


def _start_others(layers: Mapping[str, LoraLayer], adapter: str, config: LoraConfig) -> None:
    """Let layers for which nothing was found start neutrally; say which, of those that EVA looks at."""
    for layer in layers.values():
        if any(parameter.is_meta for parameter in layer.adapter_parameters(adapter)):
            layer.fill_missing(adapter, config)
        else:
            layer.reset_lora_parameters(adapter, True)
    missing = [name for name, layer in layers.items() if isinstance(layer, Linear)]
    if missing:
        warn(f"EVA has found nothing for {', '.join(map(repr, missing))}; they start as with init_lora_weights=True")


def _take_out(model: nn.Module, adapter: str, owners: list[LoraLayer]) -> None:
    """Let layers that get no rank, and those that follow them, be without the adapter."""
    taken = set(map(id, owners))
    layers = [layer for _, layer in adapter_modules(model) if isinstance(layer, LoraLayer)]
    without = [layer for layer in layers if layer.has_adapter(adapter) and id(layer.source(adapter)) in taken]
    for layer in without:
        layer.remove_adapter(adapter)
    if without:
        remove_empty_layers(model)
        note_sharing(model)


def _describe(model: nn.Module, adapter: str, layers: Mapping[str, LoraLayer]) -> None:
    """Write targets and ranks, as they are now, into the config of the adapter."""
    config, base = model.peft_config[adapter], model.get_base_model()
    modules = {name: layer for name, layer in layers.items() if layer.parameter_name is None}
    config.target_modules = list(modules)
    if len(modules) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        config.target_modules = shortest_endings(modules, names_of_modules(base))
    patterns = {name: _pattern(name, layers) for name in layers}
    config.rank_pattern = {
        patterns[name]: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r
    }
    config.alpha_pattern = {
        patterns[name]: layer.lora_alpha[adapter]
        for name, layer in layers.items()
        if layer.lora_alpha[adapter] != config.lora_alpha
    }
    named, tuner = names_of_modules(base), model.base_model
    tuner.targeted_module_names = [n for n in tuner.targeted_module_names if isinstance(named.get(n), LoraLayer)]


def _pattern(name: str, names: Mapping[str, LoraLayer]) -> str:
    """Give a key that matches one layer alone: its full name, anchored if others end like it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
