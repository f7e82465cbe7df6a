# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Containers of tensors that layers of a model share: one module that stands on the tuner and on each layer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .buffer_dict import BufferDict


class SeenOnce:
    """
    A module that stands in several places, and that a walk meets in the first of them only, whatever it asks for.

    `torch.func.functional_call` takes each place for a tie of its own, puts the caller's tensor there once per place,
    and leaves it there in the end. State dicts go another way: they have a key for each place.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the module and those inside, unless the walk has met it; see `torch.nn.Module.named_modules`."""
        return super().named_modules(memo, prefix)


class SharedParameters(SeenOnce, nn.ParameterDict):
    """Parameters by adapter name."""


class SharedBuffers(SeenOnce, BufferDict):
    """
    Buffers by adapter name. Adapters that would have the same values, such as those of one seed, use one buffer.

    That one is never written to for one of them alone.
    """

    def put_once(self, key: str, buffer: torch.Tensor, persistent: bool) -> None:
        """
        Add a tensor, or in its place one that is there already and equals it.

        Args:
            key: its name.
            buffer: the tensor.
            persistent: whether it is part of the state dict.
        """
        self.put(key, next((present for present in self.values() if _are_alike(present, buffer)), buffer), persistent)

    def take_value(self, key: str, value: torch.Tensor) -> bool:
        """
        Make a tensor ready to be written to for one name alone.

        Args:
            key: the name.
            value: what is to be written.

        Returns:
            Whether it has to be: a tensor that others use is left alone if it has the value already, and parted from
            them if it has another one.
        """
        buffer = self[key]
        if sum(other is buffer for other in self.values()) == 1:
            return True
        if value.shape == buffer.shape and torch.equal(value.to(buffer), buffer):
            return False
        self[key] = buffer.clone()
        return True

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        first: dict[int, str] = {}
        users = {key: first.setdefault(id(buffer), key) for key, buffer in self.items()}
        super()._apply(fn, *args, **kwargs)
        self._buffers.update({key: self._buffers[user] for key, user in users.items()})
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in self:
            if prefix + key in state_dict:
                self.take_value(key, state_dict[prefix + key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharedGroups(SeenOnce, nn.ModuleDict):
    """By adapter name, the tensors that groups of layers share: `SharedParameters` or `SharedBuffers` by group."""


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors cannot be told apart."""
    is_alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return is_alike and not one.is_meta and torch.equal(one, other)
