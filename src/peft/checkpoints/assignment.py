# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Values of a checkpoint and the tensors of a model that they are for."""

from collections.abc import Mapping

import torch
from torch import nn

from ..anatomy.offload import computing_device, is_offloaded
from ..anatomy.walking import adapter_modules, innermost_module
from ..layers.base_layer import BaseTunerLayer
from ..layers.shared_tensors import SharedBuffers
from ..layers.undo import keep_values
from ..utils.tensor_parallel import divide_like
from .keys import Place


def live_tensors(model: nn.Module, keys: set[str]) -> dict[str, torch.Tensor]:
    """Find parameters and buffers by their key in the state dict."""
    tensors = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        module = innermost_module(model, path)
        tensors[key] = module._parameters[name] if name in module._parameters else module._buffers[name]
    return tensors


def one_value_per_tensor(
    found: Mapping[str, torch.Tensor], keys: Mapping[str, Place], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str], tuple[str, ...]]:
    """
    Turn the content of a checkpoint into values by key in the model's state dict.

    Where a checkpoint has several values for one tensor of the model, the first is taken, which is the owner's.

    Returns:
        The values; the keys of the checkpoint that share a tensor with another one, and that one; those among them
        that have another value.
    """
    values: dict[str, torch.Tensor] = {}
    first: dict[int, tuple[str, torch.Tensor]] = {}
    tied, overruled = {}, []
    for saved, value in found.items():
        place = keys[saved]
        value = place.read(value)
        owner, owned = first.setdefault(id(tensors[place.key]), (saved, value))
        if owner == saved:
            values[place.key] = value
            continue
        tied[saved] = owner
        if not torch.equal(value.to(owned.device), owned):
            overruled.append(saved)
    return values, tied, tuple(overruled)


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """
    Write values into tensors; a tensor without storage is replaced wherever the model holds it.

    Args:
        model: the model.
        tensors: key in the model's state dict -> tensor.
        values: key -> what to write.
    """
    without_storage = {id(tensors[key]): key for key in reversed(values) if tensors[key].is_meta}
    homes = _homes(model) if without_storage else {}
    replaced = {
        token: _materialised(tensors[key], values[key], homes.get(token, homes.get(None)))
        for token, key in without_storage.items()
    }
    with torch.no_grad():
        for key, value in values.items():
            if id(tensors[key]) not in replaced:
                _write(model, key, tensors[key], value)
    if replaced:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if id(tensor) in replaced:
                        held[name] = replaced[id(tensor)]


def _write(model: nn.Module, key: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a value into a tensor; what other adapters use as well stays theirs."""
    path, _, name = key.rpartition(".")
    container = innermost_module(model, path)
    if isinstance(container, SharedBuffers):
        if not container.take_value(name, value):
            return
        tensor = container[name]
    keep_values([tensor])
    tensor.copy_(value)


def _homes(model: nn.Module) -> dict[int | None, torch.device]:
    """
    Find where tensors without storage belong: on the device of the base weight that they adapt.

    Returns:
        id of a tensor -> device; under None that of the model's first weight, for prompts, which adapt none.
    """
    homes: dict[int | None, torch.device] = {}
    for tensor in model.parameters():
        if not tensor.is_meta:
            homes[None] = tensor.device
            break
    for _, module in adapter_modules(model):
        is_layer = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if is_layer else getattr(module, "original_module", None)
        weight = None if base is None else next(base.parameters(), None)
        if weight is not None and (not weight.is_meta or is_offloaded(base)):
            home = computing_device(base, weight)
            homes.update((id(tensor), home) for tensor in module.parameters() if tensor.is_meta)
    return homes


def _materialised(tensor: torch.Tensor, value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    value = value.detach().to(device=device, dtype=tensor.dtype, copy=True)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """
    Divide the tensors of a checkpoint among processes where the model's are divided, before they are put into it.

    Args:
        model: the model.
        state_dict: key in the model's state dict -> whole tensor; those that are to be divided are replaced.
        adapter_name: kept for clients that replace the function, of which several do not want tensors divided.
    """
    divide_like(state_dict, live_tensors(model, set(state_dict)))
