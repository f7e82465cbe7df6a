# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
A deeper model out of a model's own layers, stacked several times.

The replicas of a layer are modules of their own around the same parameters, so that each can have an adapter of its
own at no cost but the adapter's. The list of layers remembers which layer each place was made of; that is how
parameters that replicas share are told from ties (`tying.groups.find_tied_groups`).
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..anatomy.replicas import REPLICATED_FROM
from ..anatomy.walking import walk
from ..layers.base_changes import change_base
from ..utils.error import PeftValueError
from ..utils.warning import warn


# lists in a model's config with one entry per layer
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """
    Copy a module.

    Args:
        module: the module.
        share_weights: let the copy have the same parameters and buffers, not copies of them.

    Example:

        >>> import torch
        >>> from peft.tuners.tuners_utils import clone_module
        >>> layer = torch.nn.Linear(2, 2)
        >>> clone_module(layer, share_weights=True).weight is layer.weight
        True
    """
    shared: dict[int, Any] = {}
    if share_weights:
        shared = {
            id(tensor): tensor for m in module.modules() for d in (m._parameters, m._buffers) for tensor in d.values()
        }
        # the model's config is one for all layers
        shared.update(
            (id(config), config) for m in module.modules() if (config := m.__dict__.get("config")) is not None
        )
        shared.pop(id(None), None)
    return copy.deepcopy(module, shared)


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """
    Stack ranges of a model's layers into a deeper model, in place. Replicas share the parameters of their original.

    If the model was replicated in the same way before, nothing is done.

    Args:
        model: a transformers model with one list of layers.
        layer_map: ranges (start, end), the end not included, of indices of the model's own layers.

    Raises:
        PeftValueError: if the model has no such list, a range lies outside, or it was replicated in another way.

    Example:

        >>> from peft.tuners.tuners_utils import replicate_layers
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> replicate_layers(model, [(0, 2), (1, 2)])
        >>> len(model.model.layers), model.config.num_hidden_layers, model.num_parameters()
        (3, 3, 1064)
    """
    present = _replicated_list(model)
    if present is not None:
        if _sources(layer_map, 1 + max(getattr(present, REPLICATED_FROM))) != getattr(present, REPLICATED_FROM):
            raise PeftValueError(
                f"layer_replication={list(layer_map)!r} does not fit the model, which was replicated in another way "
                "for the adapters that it has; load the base model again, or use the same layer_replication"
            )
        return
    owner, name, layers = _find_layers(model)
    sources = _sources(layer_map, len(layers))
    originals = list(layers)
    used: set[int] = set()
    stacked = []
    for source in sources:
        # the first place of a layer has the layer itself, so that the originals can be given back
        stacked.append(clone_module(originals[source], share_weights=True) if source in used else originals[source])
        used.add(source)
    _set_layers(layers, stacked)
    layers.__dict__[REPLICATED_FROM] = sources
    _change_depth(owner, len(originals), sources)


def remove_replicas(model: nn.Module) -> None:
    """
    Give a replicated model its own layers back.

    Args:
        model: the base model, without adapters. One that was not replicated is left alone.
    """
    layers = _replicated_list(model)
    if layers is None:
        return
    sources: list[int] = layers.__dict__.pop(REPLICATED_FROM)
    first = {source: place for place, source in reversed(list(enumerate(sources)))}
    if sorted(first) != list(range(len(first))):
        warn(
            "layer_replication has left layers out, and they are gone; the model keeps the depth that it has. Load "
            "the base model again"
        )
        return
    owner = _owner_of(model, layers)
    _set_layers(layers, [layers[first[source]] for source in sorted(first)])
    _change_depth(owner, len(sources), [first[source] for source in sorted(first)])


def separate_replicas(model: nn.Module) -> None:
    """
    Make a replicated model an ordinary one of that depth: what replicas still share is copied.

    Args:
        model: the base model, with adapters merged into it. One that was not replicated is left alone.
    """
    layers = _replicated_list(model)
    if layers is None:
        return
    del layers.__dict__[REPLICATED_FROM]
    seen: set[int] = set()
    for layer in layers:
        own: dict[int, nn.Parameter] = {}  # a parameter that stands twice within one layer stays one
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    copied = own.get(id(parameter))
                    if copied is None:
                        copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    module._parameters[name] = own[id(parameter)] = copied
        seen.update(id(parameter) for parameter in layer.parameters())


# ------------------------------------------------------------------------------------------ the list of layers
def _find_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find the list of a model's layers: as many as the config says, and all of one kind."""
    found = []
    for name, module in walk(model):
        count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        for key, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and len(child) == count and len({type(m) for m in child}) == 1:
                found.append((module, f"{name}.{key}" if name else key, child))
    if len(found) != 1:
        what = f"has {len(found)} ({', '.join(name for _, name, _ in found)})" if found else "has none"
        raise PeftValueError(
            "layer_replication needs a transformers model with one list of as many layers as "
            f"config.num_hidden_layers says; {type(model).__name__} {what}"
        )
    return found[0]


def _replicated_list(model: nn.Module) -> nn.ModuleList | None:
    return next((module for _, module in walk(model) if REPLICATED_FROM in module.__dict__), None)


def _owner_of(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    return next(module for _, module in walk(model) if layers in module._modules.values())


def _sources(layer_map: Sequence[Sequence[int]], count: int) -> list[int]:
    """List the index of the layer that stands at each place of the deeper model."""
    sources: list[int] = []
    for pair in layer_map:
        valid = not isinstance(pair, str) and len(pair) == 2 and all(isinstance(index, int) for index in pair)
        if not valid or not 0 <= pair[0] < pair[1] <= count:
            raise PeftValueError(
                f"layer_replication holds {pair!r}; it is a list of ranges (start, end) with "
                f"0 <= start < end <= {count}, the number of layers"
            )
        sources.extend(range(*pair))
    return sources


def _set_layers(layers: nn.ModuleList, stacked: Sequence[nn.Module]) -> None:
    """Fill a list of layers, and tell each its place, under which caches keep its keys and values."""
    layers._modules.clear()
    for place, layer in enumerate(stacked):
        layers._modules[str(place)] = layer
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = place


def _change_depth(owner: nn.Module, before: int, sources: Sequence[int]) -> None:
    """Bring a config in line with its model's layers."""
    config = owner.config

    def change() -> None:
        for name in _PER_LAYER:
            values = getattr(config, name, None)
            if isinstance(values, (list, tuple)) and len(values) == before:
                setattr(config, name, [values[source] for source in sources])
        config.num_hidden_layers = len(sources)

    change_base((id(config), "depth"), change)
