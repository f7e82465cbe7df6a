# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Layers of methods whose adapters may follow one rule or another."""

from typing import Any

import torch

from ...layers.additive import AdditiveLayer
from ...layers.base_layer import BaseTunerLayer
from ...layers.weight import WeightLayer
from .layers import DeclaredAdditive, DeclaredWeight


class DeclaredEither(DeclaredAdditive, DeclaredWeight):
    """Rule of `delta` and `weight`: `transforms(c)` says whether an adapter is of the latter."""

    def transforms(self, adapter: str) -> bool:
        """
        Say whether an adapter transforms the weight that it meets, and does not add the same to any.

        Args:
            adapter: name.
        """
        return self.declared.transforms(self.source(adapter).settings[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what an adapter adds to the base weight, in its layout.

        Args:
            adapter: name.
        """
        if not self.transforms(adapter):
            return super().get_delta_weight(adapter)
        weight = self.weight_before_merge()
        return self.transform_weight(adapter, weight) - weight

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight."""
        if self.transforms(adapter):
            return super().transform_weight(adapter, weight)
        return weight + self.get_delta_weight(adapter).to(weight.device, weight.dtype)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with the transformed weight if there is one; what is added alone needs none."""
        rule = WeightLayer if any(map(self.transforms, adapters)) else AdditiveLayer
        return rule.adapter_forward(self, adapters, x, *args, **kwargs)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether an adapter adds the same to any weight."""
        return not self.transforms(adapter)

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Sums have no order."""
        return AdditiveLayer.commutes_with(self, adapter, other, other_adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Put the adapter into a weight."""
        rule = WeightLayer if self.transforms(adapter) else DeclaredAdditive
        rule.merge_weight_(self, adapter, weight)

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether it can be taken out by subtracting; if not, a copy of the weight is kept."""
        return not self.transforms(adapter)
