# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How the tensors of an adapter are named, and in which form they stand, in a checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from .buffer_dict import BufferDict


class SavedForm(Protocol):
    """
    How a tensor is written to a checkpoint as several others, and read back from them.

    Attributes:
        endings: what is put behind the tensor's key, for each of the others.
        is_used: whether the tensor is written like that. It is read in either form.
    """

    endings: tuple[str, ...]
    is_used: bool

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn the model's tensor into those of the checkpoint, in the order of `endings`."""

    def read(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Turn the tensors of a checkpoint into the model's."""


def keys_in(containers: Iterable[tuple[str, Any]], adapter_name: str) -> Iterator[tuple[str, str]]:
    """Yield key in a checkpoint and key in the state dict for the tensors that containers hold for an adapter."""
    for name, container in containers:
        if adapter_name not in container:
            continue
        value = container[adapter_name]
        if not isinstance(value, nn.Module):
            if not (isinstance(container, BufferDict) and not container.persistent):
                yield name, f"{name}.{adapter_name}"
            continue
        for key in value.state_dict():
            yield f"{name}.{key}", f"{name}.{adapter_name}.{key}"
