# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rule of methods that scale features."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy.kinds import along_axis, along_features, feature_axis
from ..anatomy.offload import tensor_of
from .base_layer import BaseTunerLayer


class ActivationLayer(BaseTunerLayer):
    """Rule for methods that scale features: of the input (columns of W) or of the output (rows of W and bias)."""

    @abstractmethod
    def feature_scale(self, adapter: str) -> torch.Tensor:
        """Give the factors, (in_features,) or (out_features,)."""

    @abstractmethod
    def scales_input(self, adapter: str) -> bool:
        """Say whether the factors belong to the input."""

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Scale input and output around the base layer; input and output keep their types."""
        base, ids, dtype = self.get_base_layer(), x, x.dtype
        on_input = {adapter: self._meets_input(adapter) for adapter in adapters}
        looks_up = isinstance(base, nn.Embedding)
        for adapter in adapters:
            if on_input[adapter] and not looks_up:
                x = x * along_features(base, self.source(adapter).feature_scale(adapter))
        result = self.base_layer(x.to(dtype), *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            factors = self.source(adapter).feature_scale(adapter)
            if on_input[adapter] and looks_up:  # the inputs that are scaled are tokens
                result = result * F.embedding(ids, factors.unsqueeze(-1))
            elif not on_input[adapter]:
                result = result * along_features(base, factors)
        return result.to(dtype)

    def _axis(self, adapter: str) -> int:
        """Give the axis of the base weight along which an adapter of this layer scales."""
        return feature_axis(self.get_base_layer(), self.scales_input(adapter))

    def _meets_input(self, adapter: str) -> bool:
        """Say whether an adapter scales the inputs of this layer; what it scales in the weight is up to its owner."""
        source = self.source(adapter)
        if source is self:
            return self.scales_input(adapter)
        return source._axis(adapter) == feature_axis(self.get_base_layer(), of_input=True)

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Factors have no order, be they those of rows or of columns."""
        return isinstance(other, ActivationLayer)

    def can_unmerge(self, adapter: str) -> bool:
        """A feature that was scaled by 0 cannot be brought back."""
        return not (self.feature_scale(adapter) == 0).any()

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Scale columns or rows of the weight."""
        weight.mul_(self._scale_of_weight(adapter, weight))

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Undo the scaling."""
        weight.div_(self._scale_of_weight(adapter, weight))

    def _scale_of_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        factors = self.feature_scale(adapter).to(weight)
        return along_axis(self.get_base_layer(), factors, self._axis(adapter))

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Scale the bias, if it is the output that is scaled."""
        bias = tensor_of(self.get_base_layer(), "bias")
        return {} if bias is None or self._meets_input(adapter) else {"bias": self.bias_after(adapter, bias)}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Scale the bias likewise."""
        return bias if self._meets_input(adapter) else bias * self.source(adapter).feature_scale(adapter).to(bias)
