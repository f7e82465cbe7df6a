# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The state dict of the base model, as it would be without adapters around its modules."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..anatomy.walking import adapter_modules
from ..utils.error import PeftRuntimeError
from ..utils.wrapped_names import plain_name, renamed


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Give the state dict that the base model would have without adapters around its modules.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = base.state_dict()
    return {clean: tensors[live] for clean, live in _base_keys(base, tensors).items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """
    Load a state dict of the base model into a model with adapters.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: keys as the base model has them.
        strict: raise if keys are missing or unexpected.

    Raises:
        PeftRuntimeError: with `strict`, if keys differ.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state_dict = renamed(state_dict, plain_name)
    keys = _base_keys(base, base.state_dict())
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if strict and (missing or unexpected):
        raise PeftRuntimeError(
            f"keys of the base model's state dict differ: missing {missing[:5]} ({len(missing)}), unexpected "
            f"{unexpected[:5]} ({len(unexpected)}); strict=False loads what fits"
        )
    base.load_state_dict({keys[key]: value for key, value in state_dict.items() if key in keys}, strict=False)
    return _IncompatibleKeys(missing_keys=missing, unexpected_keys=unexpected)


def _base_keys(base: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map the keys that the bare base model has to those that it has now."""
    wrapped = {name: module._base_names[0] for name, module in adapter_modules(base)}
    keys = {live: _without_wrappers(plain_name(live), wrapped) for live in tensors}
    return {clean: live for live, clean in keys.items() if clean is not None}


def _without_wrappers(live: str, wrapped: Mapping[str, str]) -> str | None:
    """Take adapter modules out of a key; None for a key of their own tensors."""
    path, clean = "", []
    for part in live.split("."):
        if path not in wrapped:
            clean.append(part)
        elif part != wrapped[path]:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(clean)
