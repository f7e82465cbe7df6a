# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What LoRA's factors are kept in: modules and tensors by adapter name, some of which are views of a tied owner's."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.base_layer import BaseTunerLayer


class Factor(nn.Linear):
    """
    A linear layer around a weight that is made elsewhere, so that nothing is drawn at random twice.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        out_features, in_features = weight.shape
        self.__dict__.update(in_features=in_features, out_features=out_features)
        self._parameters.update(weight=weight, bias=bias)


class TiedFactor(nn.Module):
    """
    A factor of an adapter that follows another layer: a view of the owner's factor, without a parameter.

    Args:
        owner: the layer that has the factors.
        adapter: name of the adapter.
        side: which of the owner's two delta factors.
        transposed: whether this layer keeps the factor the other way round.
    """

    bias = None

    def __init__(self, owner: BaseTunerLayer, adapter: str, side: int, transposed: bool):
        super().__init__()
        # in a tuple, so that the owner does not become a submodule
        self._owner = (owner,)
        self.adapter, self.side, self.transposed = adapter, side, transposed

    @property
    def weight(self) -> torch.Tensor:
        """The factor as the owner has it at this moment, on the owner's storage."""
        weight = self._owner[0].delta_factors(self.adapter)[self.side]
        return weight.T if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the factor as a linear layer would."""
        return F.linear(x, self.weight)


class FactorDict(nn.ParameterDict):
    """Factors by adapter name as tensors, be they parameters or views of an owner's."""

    def __getitem__(self, key: str) -> torch.Tensor:
        value = super().__getitem__(key)
        return value.weight if isinstance(value, TiedFactor) else value


class TiedSettings(dict):
    """
    Settings by adapter name; those of an adapter that follows another layer are read from there.

    Args:
        settings: the layer's own settings.
        owners: adapter name -> layer that is followed.
        name: attribute that holds these settings.
    """

    def __init__(self, settings: dict[str, Any], owners: dict[str, BaseTunerLayer], name: str):
        super().__init__(settings)
        self.owners, self.name = owners, name

    def __missing__(self, adapter: str) -> Any:
        return getattr(self.owners[adapter], self.name)[adapter]


class _NoFactors(Mapping):
    """What a layer has in place of the factors of another kind of layer: nothing, and nothing can be put there."""

    def __getitem__(self, adapter: str) -> Any:
        raise KeyError(adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __reduce__(self) -> str:
        return "NO_FACTORS"


NO_FACTORS = _NoFactors()
