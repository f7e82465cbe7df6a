# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where tensors and the parts of models are."""

from typing import Any

import torch
from torch import nn

from .error import PeftRuntimeError, PeftValueError


# where accelerate keeps the weights of layers that compute elsewhere
_OFFLOADED = ("cpu", "disk")


def infer_device() -> str:
    """Name the device that tensors are loaded to when nobody says: an accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return "cpu" if accelerator is None else accelerator.type


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """
    Say on which devices the parts of a model are.

    Args:
        model: a base model.

    Returns:
        What accelerate has noted when it divided the model: name of a module -> device; for others `{"": device}`.

    Example:

        >>> from torch import nn
        >>> from peft.tuners.tuners_utils import get_device_map
        >>> get_device_map(nn.Linear(2, 2))
        {'': device(type='cpu')}
    """
    noted = getattr(model, "hf_device_map", None)
    if noted:
        return noted
    first = next(model.parameters(), None)
    return {"": torch.device("cpu") if first is None else first.device}


def get_layer_device_map(model: nn.Module) -> dict[int, Any]:
    """
    Say on which device each layer of a language model computes.

    Args:
        model: a model that accelerate has divided.

    Returns:
        Index of a layer -> device. Layers whose weights are kept in main memory or on disk compute on the first of the
        others' devices.

    Raises:
        PeftValueError: if the model was not divided.
        PeftRuntimeError: if a layer is on no device.
    """
    noted = getattr(model, "hf_device_map", None)
    if not noted:
        raise PeftValueError("the model has no hf_device_map; load it with device_map, or leave its cache where it is")
    main = next((device for device in noted.values() if device not in _OFFLOADED), "cpu")
    places = {name: main if device in _OFFLOADED else device for name, device in noted.items()}
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers = range(config.num_hidden_layers)
    if "" in places:
        return dict.fromkeys(layers, places[""])
    found = {}
    for name, device in places.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if index is not None:
            found[index] = device
    for index in layers:
        if index not in found:
            raise PeftRuntimeError(f"hf_device_map puts layer {index} on no device; it names {', '.join(places)}")
    return {index: found[index] for index in layers}


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """
    Move the keys and values in a cache to where the layers compute that read them.

    Args:
        model: a base model; nothing is done if it was not divided among devices.
        cache: a cache of transformers, changed in place.
    """
    if not getattr(model, "hf_device_map", None) or cache is None:
        return
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    for part in [part for part in parts if part is not None] or [cache]:
        for index, device in get_layer_device_map(model).items():
            if hasattr(part, "layers"):
                if index < len(part.layers) and part.layers[index].keys is not None:
                    layer = part.layers[index]
                    layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
            elif index < len(part.key_cache):  # transformers before 4.54
                part.key_cache[index] = part.key_cache[index].to(device)
                part.value_cache[index] = part.value_cache[index].to(device)
