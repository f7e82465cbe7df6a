# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Layers of methods that change some entries of the weight."""

from typing import Any

import torch
import torch.nn.functional as F

from ...anatomy.kinds import is_linear, is_plain
from ..declared.layers import DeclaredAdditive
from ..declared.tensors import Tensors


def add_entries(weight: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """
    Give a matrix with numbers added to some of its entries.

    Args:
        weight: the matrix, (out, in).
        positions: where the entries stand in it, row after row, (k,).
        values: what is added to them, (k,).

    Returns:
        A new matrix of the type that the first one has.
    """
    return weight.reshape(-1).index_add(0, positions, values.to(weight.dtype)).view(weight.shape)


class SparseLayer(DeclaredAdditive):
    """
    Rule of methods that change some entries of the weight.

    Their declaration has `entries(t, shape, c)`, positions and values as for `add_entries`, beside `delta`.

    Multiplying by the changed weight is one product, where the weight and a delta are two.
    """

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with the changed weight, where nothing but its weight decides what it gives."""
        layer = self.base_layer
        if args or kwargs or self.quantization_backend is not None or not is_plain(layer):
            return super().adapter_forward(adapters, x, *args, **kwargs)
        weight = layer.weight
        for adapter in adapters:
            source = self.source(adapter)
            weight = add_entries(weight, *self.declared.entries(*source.arguments(adapter)))
        result = F.linear(x, weight, layer.bias)
        for adapter in adapters:
            term = self.beside(adapter, x)
            result = result if term is None else result + term.to(result.dtype)
        return result

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what an adapter adds to the output."""
        if not is_linear(self.get_base_layer()):
            return super().delta_forward(adapter, x)
        tensors, shape, c = self.source(adapter).arguments(adapter)
        positions, values = self.declared.entries(tensors, shape, c)
        delta, term = add_entries(values.new_zeros(shape), positions, values), self.beside(adapter, x)
        y = F.linear(x.to(delta.dtype), delta)
        return y if term is None else y + term

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """Add the entries alone, unless the adapter adds something beside them."""
        tensors, shape, c = self.arguments(adapter)
        others = (getattr(tensors, name) for name in getattr(self.declared, "modules", ()))
        if weight.is_contiguous() and all(other is None for other in others):
            positions, values = self.declared.entries(tensors, shape, c)
            values = values.to(weight.device, weight.dtype)
            weight.view(-1).index_add_(0, positions.to(weight.device), values, alpha=sign)
        else:
            super().add_delta_(adapter, weight, sign)

    def arguments(self, adapter: str) -> tuple[Tensors, Any, Any]:
        """Give what declared functions are called with."""
        return Tensors(self, adapter), self.shape, self.settings[adapter]

    def beside(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """Compute what an adapter adds to the output apart from its entries."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that a few entries are nothing that a low rank approximates."""
        return False
