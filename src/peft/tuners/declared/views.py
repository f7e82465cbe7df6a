# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Attributes of layers that show by adapter name what stands elsewhere."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ...layers.base_layer import BaseTunerLayer


class SettingsView(MutableMapping):
    """
    One value of the settings of all adapters of a layer, by adapter name.

    Args:
        layer: the layer.
        field: name of the value.
    """

    def __init__(self, layer: BaseTunerLayer, field: str) -> None:
        self._settings, self._field = layer.settings, field

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self._settings[adapter], self._field)

    def __setitem__(self, adapter: str, value: Any) -> None:
        setattr(self._settings[adapter], self._field, value)

    def __delitem__(self, adapter: str) -> None:
        del self._settings[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __repr__(self) -> str:
        return repr(dict(self))


def setting(field: str) -> property:
    """
    Give an attribute of layers that shows one value of their settings by adapter name.

    Args:
        field: name of the value.
    """
    return property(lambda layer: SettingsView(layer, field))


class FrozenView(Mapping):
    """
    One tensor that configs tell, of all adapters of a layer that have it, by adapter name.

    Args:
        layer: the layer.
        name: name of the tensor in the functions.
    """

    def __init__(self, layer: BaseTunerLayer, name: str) -> None:
        self._layer, self._name = layer, name

    def __getitem__(self, adapter: str) -> torch.Tensor:
        tensor = self._layer.frozen(adapter, self._name) if adapter in self._layer.settings else None
        if tensor is None:
            raise KeyError(adapter)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (adapter for adapter in self._layer.settings if adapter in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def frozen_tensor(name: str) -> property:
    """
    Give an attribute of layers that shows a tensor that configs tell by adapter name.

    Args:
        name: name of the tensor in the functions.
    """
    return property(lambda layer: FrozenView(layer, name))
