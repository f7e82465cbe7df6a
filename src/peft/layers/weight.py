# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rule of methods that transform the weight."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ..anatomy.kinds import apply_weight
from ..anatomy.offload import tensor_of
from ..utils.error import PeftNotImplementedError
from .base_layer import BaseTunerLayer


class WeightLayer(BaseTunerLayer):
    """Rule for methods that transform the weight: f(W)."""

    # whether f(W) x is W g(x), and the method supplies g as `transform_input`
    transforms_input = False
    # whether f(W) x follows from W x, and the method supplies how as `correct_output`, for adapters of an owner too;
    # with `transforms_input`, whether it follows from W g(x)
    corrects_output = False

    @abstractmethod
    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight from a weight of the base layer's shape and layout."""

    def forward_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight for the forward pass: as it is merged, unless the method has dropout."""
        return self.transform_weight(adapter, weight)

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the weight that `transform_weight` was given, where the method can."""
        raise PeftNotImplementedError(f"the transform of {type(self).__name__} has no inverse")

    def transform_input(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base layer has to be given to give what the adapted one does, where the method can."""
        raise PeftNotImplementedError(f"{type(self).__name__} transforms weights only")

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Compute what the adapted layer gives from what the base layer does, where the method can."""
        raise PeftNotImplementedError(f"{type(self).__name__} transforms weights only")

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the base layer with the transformed weight, or with transformed inputs where that is the same."""
        if self.transforms_input and all(map(self._meets_input_alike, adapters)):
            dtype = x.dtype
            for adapter in reversed(adapters):  # the last to transform the weight is the first to meet the input
                source = self.source(adapter)
                x = source.transform_input(adapter, x.to(next(source.adapter_parameters(adapter)).dtype))
            result = self.base_layer(x.to(dtype), *args, **kwargs)
            return self.correct_outputs(adapters, x, result) if self.corrects_output else result
        if self.corrects_output and not self.transforms_input:
            return self.correct_outputs(adapters, x, self.base_layer(x, *args, **kwargs))
        layer = self.get_base_layer()
        weight = inner = self.inner_weight()
        for adapter in adapters:
            weight = self.source(adapter).forward_weight(adapter, weight)
        bias, dtype = tensor_of(layer, "bias"), self.stored_weight().dtype
        if self.quantization_backend is not None:  # the layer would bring inputs and bias to a type of its own
            dtype = x.dtype if x.is_floating_point() else weight.dtype
            bias = None if bias is None else bias.to(dtype)
        if self.base_layer is not layer:  # adapter layers inside may change more than the weight
            change = apply_weight(layer, x, (weight - inner).to(dtype))
            return self.base_layer(x, *args, **kwargs) + change
        return apply_weight(layer, x, weight.to(dtype), bias)

    def _meets_input_alike(self, adapter: str) -> bool:
        """Say whether an adapter does to the input of this layer what it does to that of its owner."""
        if adapter not in self._owners:
            return True
        return not self.corrects_output and type(self.source(adapter).get_base_layer()) is type(self.get_base_layer())

    def correct_outputs(self, adapters: Sequence[str], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Do so for adapters one after the other."""
        for adapter in adapters:
            result = self.correct_output(adapter, x, result)
        return result

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the method has an inverse."""
        return type(self).inverse_weight is not WeightLayer.inverse_weight

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the transformed weight, as the forward pass has it."""
        return self.forward_weight(adapter, weight)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Replace the weight by the transformed one."""
        weight.copy_(self.transform_weight(adapter, weight))

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Replace the weight by what it was transformed from."""
        weight.copy_(self.inverse_weight(adapter, weight))
