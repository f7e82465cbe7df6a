# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Buffers by adapter name, as `nn.ParameterDict` has parameters."""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView

import torch
from torch import nn


class BufferDict(nn.Module):
    """
    A mapping of tensors that move with the module and are no parameters.

    Args:
        buffers: name -> tensor.
        persistent: whether the tensors are part of the state dict; `put` says it of a single one.

    Example:

        >>> import torch
        >>> from peft.tuners._buffer_dict import BufferDict
        >>> BufferDict({"default": torch.zeros(2)})["default"]
        tensor([0., 0.])
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.put(key, buffer, self.is_persistent(key) if key in self else self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def put(self, key: str, buffer: torch.Tensor, persistent: bool) -> None:
        """
        Add a tensor, replacing one of the same name.

        Args:
            key: its name.
            buffer: the tensor.
            persistent: whether this one is part of the state dict, whatever holds for the others.
        """
        self.register_buffer(key, buffer, persistent=persistent)

    def is_persistent(self, key: str) -> bool:
        """Say whether a tensor is part of the state dict."""
        return key not in self._non_persistent_buffers_set

    def clear(self) -> None:
        """Remove every tensor."""
        for key in list(self._buffers):
            del self[key]

    def pop(self, key: str) -> torch.Tensor:
        """Remove a tensor and return it."""
        value = self[key]
        del self[key]
        return value

    def keys(self) -> KeysView[str]:
        """Names."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Names and tensors."""
        return self._buffers.items()

    def values(self) -> ValuesView[torch.Tensor]:
        """Tensors."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Add tensors, replacing those of the same name."""
        for key, buffer in buffers.items():
            self[key] = buffer

    def extra_repr(self) -> str:
        """Describe the tensors for `repr`."""
        return "\n".join(f"({key}): {tuple(value.shape)} {value.dtype}" for key, value in self.items())

    def __call__(self, input: object) -> None:
        raise TypeError("a BufferDict holds tensors and cannot be called")
