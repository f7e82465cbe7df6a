# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Trained copies of modules that are kept in float32 beside a base model in half precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def call_in_own_type(copied: nn.Module, original: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """
    Call a copy of a module in the type that its own parameters have; what it gives has the type of the original.

    Args:
        copied: the copy; parameters that it shares with the base model may be of another type.
        original: the module that was copied.
        args: what it is given, in the type of the base model.
        kwargs: likewise.
    """
    own = given = None
    for new, old in zip(copied.parameters(), original.parameters(), strict=False):
        if new.dtype != old.dtype:
            own, given = new.dtype, old.dtype
            break
    if own is None or not (own.is_floating_point and given.is_floating_point):
        return copied(*args, **kwargs)
    args, kwargs = _cast(args, given, own), _cast(dict(kwargs), given, own)
    others = {name: p.to(own) for name, p in copied.named_parameters() if p.dtype == given}
    # tensors that are shared with the base model are brought to the type of the others for this call
    result = functional_call(copied, others, args, kwargs) if others else copied(*args, **kwargs)
    return _cast(result, own, given)


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Bring the tensors of one type in what a module takes or gives to another one."""
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, tuple):
        parts = [_cast(part, source, target) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) in (list, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        cast = {key: _cast(part, source, target) for key, part in items}
        return cast if isinstance(value, dict) else list(cast.values())
    if isinstance(value, dict):  # an output of a model of transformers
        for key, part in list(value.items()):
            value[key] = _cast(part, source, target)
    return value


def in_type_of(copied: nn.Module, original: nn.Module) -> nn.Module:
    """Bring a copy to the types of the module that was copied, in whose place it is going to stand for good."""
    for read in (nn.Module.named_parameters, nn.Module.named_buffers):
        types = {name: tensor.dtype for name, tensor in read(original, remove_duplicate=False)}
        for name, tensor in read(copied, remove_duplicate=False):
            if tensor.dtype != types.get(name, tensor.dtype):
                tensor.data = tensor.data.to(types[name])
    return copied
