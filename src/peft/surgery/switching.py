# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is done to an adapter in all modules of a model at once: choosing, freezing, deleting and casting it."""

from collections.abc import Iterable

import torch
from torch import nn

from ..anatomy.walking import adapter_modules
from ..layers.adapter_module import AdapterModule
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.layer import unmerge_layers
from ..layers.training_wrapper import AuxiliaryTrainingWrapper
from ..utils.warning import warn
from .slots import Slots


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """
    Choose the adapters that a model uses; others are frozen.

    Args:
        model: a model with adapter layers.
        adapter_name: one name or several.
        inference_mode: freeze the chosen ones too.
        layer_cls: which layers to switch; training wrappers are always switched.
    """
    modules = [module for _, module in adapter_modules(model)]
    wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = [module for module in modules if isinstance(module, layer_cls)]
    for wrapper in wrappers:  # may refuse several names, so they come first
        wrapper.check_set_adapter(adapter_name)
    if any(layer.merged for layer in layers):
        warn("adapters are merged; they are unmerged before another one is set")
    unmerge_layers(layers)
    for module in (*layers, *wrappers):
        module.set_adapter(adapter_name, inference_mode=inference_mode)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """
    Choose the adapters of modules and tokens that are trained in full; adapter layers stay as they are.

    Args:
        model: a model with such modules.
        adapter_name: one name or several.
        inference_mode: freeze the chosen ones too.
    """
    wrappers = [module for _, module in adapter_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        wrapper.check_set_adapter(adapter_name)
    for wrapper in wrappers:
        wrapper.set_adapter(adapter_name, inference_mode=inference_mode)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """
    Freeze every parameter in whose name an adapter's name stands, those of prompts among them.

    Args:
        model: a model with the adapter in it.
        adapter_name: its name.
    """
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in f".{name}.":
            parameter.requires_grad_(False)


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """
    Freeze adapters or let them be trained.

    Args:
        model: a model with adapter layers.
        adapter_names: one name or several.
        requires_grad: False to freeze.
    """
    for _, module in adapter_modules(model):
        module.set_requires_grad(adapter_names, requires_grad)


def is_trained(model: nn.Module, adapter_name: str) -> bool:
    """
    Say whether any parameter of an adapter is trained, or is going to be when adapters are switched on again.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
    """
    modules = [module for _, module in adapter_modules(model)]
    return any(
        adapter_name in (module._trained_before or ())
        or any(parameter.requires_grad for parameter in module.adapter_parameters(adapter_name))
        for module in modules
    )


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """
    Remove an adapter from a model.

    Args:
        model: a model with adapter layers.
        adapter_name: name.
        prefix: prefix of the method's parameter names (kept for callers of the released package).
        layer_cls: which layers to remove it from; training wrappers always lose it.

    Returns:
        Names of the adapters that are active afterwards, None if there is no adapter layer.
    """
    _unmerge(model, adapter_name, layer_cls)
    active = None
    for _, module in adapter_modules(model):
        if isinstance(module, layer_cls):
            module.delete_adapter(adapter_name)
            active = module.active_adapters
    for _, module in adapter_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters=active)
    return active


def _unmerge(model: nn.Module, adapter_name: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> None:
    """Take an adapter out of all weights while all of its tensors are there, those of followed layers too."""
    layers = [module for _, module in adapter_modules(model) if isinstance(module, layer_cls)]
    unmerge_layers(layer for layer in layers if adapter_name in layer.merged_adapters)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """
    Take everything of an adapter out of a model, so that another one can be made under its name.

    Unlike `delete_adapter`, which adapters are active stays as it is, and modules that were there for this adapter
    alone give way to those of the base model.

    Args:
        model: a model with adapter layers, or without.
        adapter_name: name; if there is no such adapter, nothing is done.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    modules = [m for _, m in adapter_modules(model) if isinstance(m, kinds) and m.has_adapter(adapter_name)]
    if not modules:
        return
    _unmerge(model, adapter_name)
    for module in modules:
        module.remove_adapter(adapter_name)
    _take_off_empty(model, modules)


def remove_empty_layers(model: nn.Module) -> None:
    """
    Let adapter layers that no adapter is left in give way to what they are around.

    Args:
        model: a model with adapter layers.
    """
    _take_off_empty(model, [module for _, module in adapter_modules(model) if isinstance(module, BaseTunerLayer)])


def _take_off_empty(model: nn.Module, modules: Iterable[AdapterModule]) -> None:
    """Do so for modules that are given outermost first."""
    empty = [module for module in modules if not module.available_adapters]
    slots = Slots(model) if empty else None
    for module in empty:
        slots.replace(module, module._modules[module._base_names[0]])


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """
    Bring an adapter's tensors that are in half precision to float32, in which training is stable.

    Args:
        model: a model with adapter layers.
        adapter_name: name.
        autocast_adapter_dtype: False to leave everything as it is.
    """
    if not autocast_adapter_dtype:
        return
    for _, module in adapter_modules(model):
        if isinstance(module, BaseTunerLayer):
            for parameter in module.adapter_parameters(adapter_name):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """
    Bring parameters to the types for mixed precision: float32 for what is trained, another one for what is frozen.

    Args:
        model: any model.
        dtype: type for frozen parameters, such as `torch.bfloat16`.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, cast_mixed_precision_params, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> cast_mixed_precision_params(model, torch.bfloat16)
        >>> sorted({(parameter.requires_grad, str(parameter.dtype)) for parameter in model.parameters()})
        [(False, 'torch.bfloat16'), (True, 'torch.float32')]
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
