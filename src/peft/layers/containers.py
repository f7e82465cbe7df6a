# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What containers of tensors by adapter name hold for one adapter."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .buffer_dict import BufferDict


def keys_in(containers: Iterable[tuple[str, Any]], adapter_name: str) -> Iterator[tuple[str, str]]:
    """
    Yield for the tensors of an adapter the key in a checkpoint, and the key in the state dict of their layer.

    Args:
        containers: name in the layer, and container.
        adapter_name: name of the adapter.
    """
    for name, container in containers:
        if adapter_name not in container:
            continue
        value = container[adapter_name]
        if not isinstance(value, nn.Module):
            if not isinstance(container, BufferDict) or container.is_persistent(adapter_name):
                yield name, f"{name}.{adapter_name}"
            continue
        for key in value.state_dict():
            yield f"{name}.{key}", f"{name}.{adapter_name}.{key}"


def parameters_in(containers: Iterable[tuple[str, Any]], adapter_name: str) -> Iterator[nn.Parameter]:
    """
    Yield the parameters of an adapter.

    Inside of `torch.func.functional_call` it is the tensors that stand in their places, which are no `Parameter`.

    Args:
        containers: name in the layer, and container.
        adapter_name: name of the adapter.
    """
    for _, container in containers:
        own = container._parameters.get(adapter_name)
        if own is not None:
            yield own
        elif (module := container._modules.get(adapter_name)) is not None:
            # without modules inside there is nothing to walk through, which would take most of the time of switching
            yield from module.parameters() if module._modules else _own_parameters(module)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]
