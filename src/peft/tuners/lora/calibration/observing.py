# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Looking at the inputs of layers while a model is run, and the mode that it is run in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def observing_inputs(layers: Mapping[str, nn.Module], look: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """
    Call a function with the inputs of layers, before each of their calls in a context.

    Args:
        layers: name -> layer.
        look: is called with the name of the layer and its positional arguments.
    """
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """
    Switch all modules of a model to training or evaluation, and each back to what it was.

    Args:
        model: the model.
        training: False to evaluate.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def move_to_device(batch: Any, device: torch.device | str) -> Any:
    """
    Move the tensors of a batch.

    Args:
        batch: a tensor, or mappings, lists and tuples of such; everything else is left as it is.
        device: where to.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move_to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_to_device(value, device) for value in batch)
    return batch


def devices_of(model: nn.Module) -> list[torch.device]:
    """Give the devices that hold parameters of a model; those without storage do not count."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters() if not parameter.is_meta))
