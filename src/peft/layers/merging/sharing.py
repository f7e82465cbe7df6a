# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which layers of a model share a base weight, and who else holds it."""

from collections import Counter
from collections.abc import Hashable, Iterable

from torch import nn

from ...anatomy.walking import adapter_modules, base_modules
from ...utils.same_tensor import identity_of
from .mergeable_layer import MergeableLayer
from .state import Sharing, original_weights


def merging_layers(model: nn.Module) -> list[MergeableLayer]:
    """List the adapter layers of a model whose adapters can be merged."""
    return [module for _, module in adapter_modules(model) if isinstance(module, MergeableLayer)]


def note_sharing(model: nn.Module) -> None:
    """
    Tell the adapter layers of a model who else holds their base weights.

    One layer can then be merged by itself, and share its weight again as soon as the others are merged alike.

    Args:
        model: a model with adapter layers.
    """
    layers = merging_layers(model)
    with original_weights(layers):
        counts = count_holders(model)
        sharing = {key: Sharing([], []) for key, count in counts.items() if count > 1}
        for module in base_modules(model) if sharing else ():
            for name, parameter in module._parameters.items():
                if parameter is not None and (key := identity_of(parameter)) in sharing:
                    sharing[key].places.append((module, name))
        for layer in layers:
            shared = sharing.get(weight_key(layer)) if sharing else None
            layer.__dict__["_sharing"] = shared
            if shared is not None:
                shared.layers.append(layer)


def sharing_layers(layer: MergeableLayer) -> tuple[list[MergeableLayer], int]:
    """
    Find the layers whose base weight is that of a layer, or would be if nothing were merged.

    Returns:
        The layers, this one among them, and the number of modules that hold the weight, adapted or not.
    """
    sharing = layer._sharing
    if sharing is None:
        return [layer], 1
    with original_weights(sharing.layers):  # ties may have been made and cut since the layers were told
        key = weight_key(layer)
        layers = [other for other in sharing.layers if weight_key(other) == key]
        held = (module._parameters.get(name) for module, name in sharing.places)
        holders = sum(parameter is not None and identity_of(parameter) == key for parameter in held)
    return (layers, holders) if layer in layers else ([layer], 1)


def layers_by_weight(model: nn.Module, layers: Iterable[MergeableLayer]) -> list[tuple[list[MergeableLayer], int]]:
    """
    Put layers together that use one base weight.

    Args:
        model: the model that they are in.
        layers: adapter layers.

    Returns:
        For each weight its layers, and the number of modules that hold it, adapted or not.
    """
    layers = list(layers)
    by_weight: dict[Hashable, list[MergeableLayer]] = {}
    with original_weights(layers):  # a layer that was merged by itself has a copy
        holders = count_holders(model)
        for layer in layers:
            by_weight.setdefault(weight_key(layer), []).append(layer)
    return [(sharing, holders.get(key, 1)) for key, sharing in by_weight.items()]


def weight_key(layer: MergeableLayer) -> Hashable:
    """Identify the weight of a layer; the layer of the base model stands for one that holds no such tensor."""
    base = layer.get_base_layer()
    held = next((h[layer.weight_name] for h in (base._parameters, base._buffers) if layer.weight_name in h), None)
    return id(base) if held is None else identity_of(held)


def count_holders(model: nn.Module) -> dict[Hashable, int]:
    """Count for each parameter of the base model the places that hold it."""
    held = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(identity_of(parameter) for parameter in held if parameter is not None)
