# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Weights that a layer does not hold but computes from other tensors: the parametrisations of `torch.nn.utils`.

What is written into such a weight is gone in the next forward pass. It has to be written into the tensors that the
weight is computed from, and that is possible only if they can stand for any matrix, as those of weight normalisation
can.
"""

import copy
from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .error import PeftNotImplementedError


class ComputedWeight(ABC):
    """
    How a layer computes its weight.

    Args:
        layer: the layer.
        name: attribute that gives the weight.
    """

    def __init__(self, layer: nn.Module, name: str):
        self.layer, self.name = layer, name

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name for people."""

    @abstractmethod
    def _inverse(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Find tensors of which the layer may compute a weight: full name in the layer -> tensor."""

    @abstractmethod
    def _computed(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the weight from such tensors."""

    @torch.no_grad()
    def tensors_for(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Find what the layer has to hold to compute a weight; the layer itself stays as it is.

        Args:
            weight: of the shape of the present one.

        Returns:
            Full name in the layer -> tensor.

        Raises:
            PeftNotImplementedError: if there is nothing that it computes that very weight from.
        """
        try:
            tensors = self._inverse(weight)
            error = (self._computed(tensors) - weight).abs().max()
        except (RuntimeError, ValueError, NotImplementedError):  # which is how parametrisations say so
            tensors, error = {}, torch.tensor(torch.inf)
        if not error <= 32 * torch.finfo(weight.dtype).eps * weight.abs().max():
            raise PeftNotImplementedError(
                f"the {self.name} of a {type(self.layer).__name__} layer is computed by {self.kind}, which cannot "
                "give what the weight would be; nothing was changed. Keep the adapter unmerged, or take the "
                "parametrisation off before the model is adapted (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        return tensors


class _Parametrized(ComputedWeight):
    """A weight with parametrisations of `torch.nn.utils.parametrize`."""

    @property
    def _list(self) -> parametrize.ParametrizationList:
        return self.layer.parametrizations[self.name]

    def _copies(self) -> list[nn.Module]:
        """Copy what computes: some modules count their calls, or note what they were last given."""
        return [copy.deepcopy(module).eval() for module in self._list]

    @property
    def kind(self) -> str:
        return ", ".join(type(module).__name__.strip("_") for module in self._list)

    def _inverse(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        value = weight
        for module in reversed(self._copies()):
            if not hasattr(module, "right_inverse"):
                raise NotImplementedError
            value = module.right_inverse(value)
        prefix = f"parametrizations.{self.name}.original"
        if self._list.is_tensor:
            return {prefix: value.clone()}
        return {f"{prefix}{place}": part.clone() for place, part in enumerate(value)}

    def _computed(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        first, *others = self._copies()
        weight = first(*tensors.values())
        for module in others:
            weight = module(weight)
        return weight


class _Hooked(ComputedWeight):
    """A weight that a hook of `torch.nn.utils` computes before each forward pass."""

    def __init__(self, layer: nn.Module, name: str, hook: WeightNorm | SpectralNorm):
        super().__init__(layer, name)
        self.hook = hook

    @property
    def kind(self) -> str:
        return type(self.hook).__name__

    def _inverse(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if not isinstance(self.hook, WeightNorm):
            raise NotImplementedError
        magnitude = torch.norm_except_dim(weight, 2, self.hook.dim)
        # the attribute itself too, for those who read it before the next forward pass
        return {f"{self.name}_g": magnitude, f"{self.name}_v": weight.clone(), self.name: weight.clone()}

    def _computed(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch._weight_norm(tensors[f"{self.name}_v"], tensors[f"{self.name}_g"], self.hook.dim)


def find_computed_weight(layer: nn.Module, name: str) -> ComputedWeight | None:
    """
    Find out how a layer computes its weight.

    Args:
        layer: a layer of the base model.
        name: attribute that gives the weight.

    Returns:
        None if the layer holds its weight itself.

    Example:

        >>> import torch
        >>> from peft.utils.computed_weights import find_computed_weight
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
        >>> sorted(find_computed_weight(layer, "weight").tensors_for(torch.ones(2, 2)))
        ['parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    if name in layer._parameters:
        return None
    if parametrize.is_parametrized(layer, name):
        return _Parametrized(layer, name)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name:
            return _Hooked(layer, name, hook)
    return None
