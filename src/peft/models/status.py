# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What state the adapters of a model are in: which are there, active, merged, trained, and where."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy.walking import adapter_modules
from ..layers.adapter_module import AdapterModule
from ..layers.base_layer import BaseTunerLayer
from ..layers.token_wrapper import TrainableTokensWrapper
from ..utils.error import PeftTypeError, PeftValueError


IRREGULAR = "irregular"
Irregular = Literal["irregular"]
Switch = bool | Irregular
Names = list[str]


@dataclass
class TunerLayerStatus:
    """
    State of one layer or wrapper.

    Attributes:
        name: full name, without what `PeftModel` puts in front.
        module_type: class, with the method's name in front where classes of several methods are called alike.
        enabled: whether adapters are switched on.
        active_adapters: names of the adapters in use; the layer need not have all of them.
        merged_adapters: names of those that are merged into the base weight.
        requires_grad: adapter name -> whether it is trained; "irregular" if some of its tensors are.
        available_adapters: names of the adapters that the layer has.
        devices: adapter name -> where its tensors are.
        quantization_backend: name of what the base layer is quantised with, None if it is not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: Names
    merged_adapters: Names
    requires_grad: dict[str, Switch]
    available_adapters: Names
    devices: dict[str, Names]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """
    State of all layers of a model taken together; "irregular" is what layers do not agree on.

    Attributes:
        base_model_type: class of the base model; "other" without a `PeftModel` around it, unless it is one of
            transformers.
        adapter_model_type: class of the tuner; "None" without one.
        peft_types: adapter name -> method; empty without a `PeftModel`.
        trainable_params: number of parameters that are trained.
        total_params: number of all parameters; one that several modules share counts once.
        num_adapter_layers: number of layers and wrappers.
        enabled: whether adapters are switched on.
        active_adapters: names of the adapters in use.
        merged_adapters: names of those that are merged.
        requires_grad: adapter name -> whether it is trained.
        available_adapters: names of all adapters.
        devices: adapter name -> where its tensors are.
        quantization_backend: name of what the adapted layers are quantised with, None if none of them is.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Switch
    active_adapters: Names | Irregular
    merged_adapters: Names | Irregular
    requires_grad: dict[str, Switch]
    available_adapters: Names
    devices: dict[str, Names]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """
    Say in which state each adapter layer and training wrapper of a model is.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        PeftTypeError: for prompt learning, which adapts no layers.
        PeftValueError: if the model has no adapter.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_layer_status, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> status = get_layer_status(model)[0]
        >>> status.name, status.module_type, status.active_adapters, status.requires_grad
        ('model.0', 'lora.Linear', ['default'], {'default': True})
    """
    return [_status_of(name, module) for name, module in _modules_of(model)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """
    Say in which state the adapters of a model are; what layers do not agree on is "irregular".

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        PeftTypeError: for prompt learning, which adapts no layers.
        PeftValueError: if the model has no adapter.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_model_status, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0", "1"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), config)
        >>> status = get_model_status(model)
        >>> status.trainable_params, status.total_params, status.merged_adapters
        (32, 72, [])
        >>> model.get_base_model()[0].merge()
        >>> get_model_status(model).merged_adapters
        'irregular'
    """
    layers = get_layer_status(model)
    is_wrapped = _is_wrapped(model)
    names = dict.fromkeys(name for layer in layers for name in layer.available_adapters)
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=_base_type(model, is_wrapped),
        adapter_model_type=type(model.base_model).__name__ if is_wrapped else "None",
        peft_types={name: _text(config.peft_type) for name, config in model.peft_config.items()} if is_wrapped else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_active_in(layers),
        merged_adapters=_merged_in(layers),
        requires_grad=_by_adapter(layers, names, lambda layer: layer.requires_grad, _agreed),
        available_adapters=sorted(names),
        devices=_by_adapter(layers, names, lambda layer: layer.devices, lambda found: sorted({*sum(found, [])})),
        quantization_backend=_agreed(layer.quantization_backend for layer in layers if _is_layer(layer)) or None,
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """
    Count parameters; one that several modules share counts once.

    Args:
        model: any model.

    Returns:
        Trainable parameters, all parameters.
    """
    trainable = total = 0
    for parameter in model.parameters():
        # ZeRO-3 keeps the whole size apart; 4-bit weights hold two values per byte
        count = getattr(parameter, "ds_numel", 0) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * getattr(getattr(parameter, "quant_storage", torch.uint8), "itemsize", 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _modules_of(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """List the adapter modules of a model with the names that a report has for them."""
    modules = model.__dict__.get("_modules", {})
    if "prompt_encoder" in modules:
        raise PeftTypeError(
            "prompt learning puts tokens or keys and values in front of the inputs and adapts no layer, so there is "
            "no status of layers; model.peft_config and model.active_adapter say what there is"
        )
    start = model.base_model if _is_wrapped(model) else model
    found = [
        (name, module) for name, module in adapter_modules(start) if not isinstance(module, TrainableTokensWrapper)
    ]
    if not found:
        raise PeftValueError(
            f"no adapter layer in this {type(model).__name__}; get_peft_model or inject_adapter_in_model puts them in"
        )
    return found


def _is_wrapped(model: nn.Module) -> bool:
    """Say whether a model is a `PeftModel` or alike; transformers' models have a `base_model` of another kind."""
    return "base_model" in model._modules and hasattr(model._modules["base_model"], "tuner_layer_cls")


def _base_type(model: nn.Module, is_wrapped: bool) -> str:
    if is_wrapped:
        return type(model.base_model.model).__name__
    return type(model).__name__ if isinstance(model, PreTrainedModel) else "other"


def _status_of(name: str, module: AdapterModule) -> TunerLayerStatus:
    names = sorted(module.available_adapters)
    is_layer = isinstance(module, BaseTunerLayer)  # wrappers answer as the modules inside them do
    tensors = {name: list(_tensors_of(module, name)) for name in names}
    return TunerLayerStatus(
        name=name,
        module_type=_type_name(type(module)),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters) if is_layer else [],
        requires_grad={name: _agreed(p.requires_grad for p in tensors[name]) for name in names},
        available_adapters=names,
        devices={name: sorted({p.device.type for p in tensors[name]}) for name in names},
        quantization_backend=getattr(module.quantization_backend, "backend_name", None) if is_layer else None,
    )


def _tensors_of(module: AdapterModule, adapter_name: str) -> Iterator[nn.Parameter]:
    """Yield an adapter's parameters; of a layer that follows another one, those of the owner."""
    source = module.source(adapter_name) if isinstance(module, BaseTunerLayer) else module
    return (p for p in source.adapter_parameters(adapter_name) if p.is_floating_point())


def _type_name(module_cls: type) -> str:
    """Put the method's name in front of a class that stands in the package of one."""
    packages = module_cls.__module__.split(".")[:-1]
    return f"{packages[-1]}.{module_cls.__name__}" if "tuners" in packages[:-1] else module_cls.__name__


def _agreed(values: Iterable[Any]) -> Any:
    """Give what all values are; False if there are none."""
    values = list(values)
    if not values:
        return False
    return values[0] if all(value == values[0] for value in values) else IRREGULAR


def _is_layer(status: TunerLayerStatus) -> bool:
    """Say whether a status is that of a layer, not that of a wrapper of a module that is trained in full."""
    return status.module_type != "ModulesToSaveWrapper"


def _active_in(layers: list[TunerLayerStatus]) -> Names | Irregular:
    """Find the adapters that are active wherever they are."""
    active = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    for layer in layers:
        if any(name in layer.available_adapters and name not in layer.active_adapters for name in active):
            return IRREGULAR
    return list(active)


def _merged_in(layers: list[TunerLayerStatus]) -> Names | Irregular:
    """Find the adapters that are merged wherever they could be."""
    merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
    can_merge = [layer for layer in layers if _is_layer(layer)]
    for name in merged:
        if any(name in layer.available_adapters and name not in layer.merged_adapters for layer in can_merge):
            return IRREGULAR
    return list(merged)


def _by_adapter(
    layers: list[TunerLayerStatus],
    names: Iterable[str],
    field: Callable[[TunerLayerStatus], dict[str, Any]],
    combine: Callable[[list[Any]], Any],
) -> dict[str, Any]:
    """Combine what the layers that have an adapter say about it."""
    return {name: combine([field(layer)[name] for layer in layers if name in field(layer)]) for name in names}


def _text(peft_type: Any) -> str:
    return getattr(peft_type, "value", str(peft_type))
