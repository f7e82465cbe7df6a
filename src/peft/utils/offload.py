# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Base models whose weights accelerate keeps away from the modules: in main memory, or on disk.

Between two forward passes an offloaded module holds parameters without storage. Adapters that add to what it computes
work all the same. What has to read, copy or share the weight itself does not, and is refused here, because it would
go wrong without a word: copies would compute with the base weights, and merging would change nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..tuners._matching import lies_in
from ..tuners._surgery import bare_modules
from .error import PeftRuntimeError, PeftValueError


def is_offloaded(module: nn.Module) -> bool:
    """Say whether accelerate keeps parameters of this very module elsewhere."""
    return _offloading_hook(module) is not None and any(
        parameter is not None and parameter.is_meta for parameter in module._parameters.values()
    )


def computing_device(module: nn.Module, weight: torch.Tensor) -> Any:
    """Give the device on which a layer computes: that of its weight, or where accelerate brings an offloaded one."""
    return _offloading_hook(module).execution_device if is_offloaded(module) else weight.device


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    return next((part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)), None)


def refuse_offloaded(model: nn.Module, config: PeftConfig, targets: Iterable[str]) -> None:
    """
    Refuse configs that need a weight itself where it is offloaded, before anything is changed.

    These are modules that are trained in full, and targets that are tied: accelerate gives each member of a tie a
    parameter of its own, so the tie cannot be seen any more, let alone be kept.

    Args:
        model: the base model.
        config: config with resolved targets.
        targets: full names of the modules to adapt.

    Raises:
        PeftValueError: if there is such a module.
    """
    offloaded = {name: module for name, module in bare_modules(model) if is_offloaded(module)}
    if not offloaded:
        return
    saved = getattr(config, "modules_to_save", None) or ()
    copied = [name for name in offloaded if saved and lies_in(saved, name)]
    if copied:
        raise PeftValueError(
            f"modules_to_save reaches {copied[0]!r}, whose weight is offloaded and cannot be copied; nothing was "
            "changed. Give it a device of its own in device_map, or add the adapter before the model is dispatched"
        )
    tied = _members_of_ties(model, offloaded)
    reached = sorted(tied & set(targets))
    if reached:
        raise PeftValueError(
            f"{reached[0]!r} shares its weight with another module, and is offloaded, so that the two cannot be seen "
            "to be one; nothing was changed. Give all modules that share the weight one device in device_map, or "
            "leave them out of target_modules"
        )


def _members_of_ties(model: nn.Module, offloaded: dict[str, nn.Module]) -> set[str]:
    """Find offloaded modules whose weights were tied: accelerate has noted it, or the model declares it."""
    noted = {
        name for name, module in offloaded.items() if getattr(_offloading_hook(module), "tied_params_names", None)
    }
    declared: set[str] = set()
    for prefix, module in bare_modules(model):
        keys: Any = getattr(module, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            members = (member.rpartition(".")[0] for pair in keys.items() for member in pair)
            declared.update(f"{prefix}.{member}" if prefix else member for member in members)
    return noted | (declared & set(offloaded))


def refuse_merge_into_offloaded(module: nn.Module) -> None:
    """
    Refuse to merge into a weight that is not there.

    Args:
        module: layer of the base model.

    Raises:
        PeftRuntimeError: if its weight is offloaded.
    """
    if is_offloaded(module):
        raise PeftRuntimeError(
            f"the weight of a {type(module).__name__} layer is offloaded, so nothing can be merged into it; load the "
            "model without offloading to merge"
        )
