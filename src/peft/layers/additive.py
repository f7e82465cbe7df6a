# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rule of methods that add to the weight."""

from abc import abstractmethod
from typing import Any

import torch

from ..anatomy.kinds import apply_weight
from .base_layer import BaseTunerLayer


class AdditiveLayer(BaseTunerLayer):
    """Rule for methods that add to the weight: W + delta."""

    # whether `delta_forward` also computes adapters that are taken from an owner, through views of its tensors
    has_views_of_owner = False

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what the adapter adds to the base weight.

        Returns:
            A tensor of the shape and layout of the base weight.
        """

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """
        Add `sign` times the delta to a weight in place. Methods may do it without building the delta.

        Args:
            adapter: name.
            weight: tensor of the shape and layout of the base weight.
            sign: 1 to merge, -1 to unmerge.
        """
        delta = self.get_delta_weight(adapter)
        weight.add_(delta.to(weight.device, weight.dtype), alpha=sign)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the adapter adds to the output. Methods may do it without building the delta."""
        delta = self.source(adapter).get_delta_weight(adapter)
        return apply_weight(self.get_base_layer(), x.to(delta.dtype) if x.is_floating_point() else x, delta)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add the adapters' terms to the base layer's output; the output keeps its type."""
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            if adapter in self._owners and not self.has_views_of_owner:
                result = result + AdditiveLayer.delta_forward(self, adapter, x)
            else:
                result = result + self.delta_forward(adapter, x)
        return result if result.dtype == dtype else result.to(dtype)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether an adapter does nothing but add its delta to whatever weight there is."""
        return True

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Sums have no order."""
        return isinstance(other, AdditiveLayer) and self.adds_delta(adapter) and other.adds_delta(other_adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta."""
        self.add_delta_(adapter, weight, 1.0)

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Subtract the delta."""
        self.add_delta_(adapter, weight, -1.0)
