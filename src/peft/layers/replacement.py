# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rule of methods that train a copy of the layer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.offload import refuse_copy_of_offloaded
from .base_layer import BaseTunerLayer
from .borrowing import copy_borrowing, shared_places
from .new_tensors import copy_module


class ReplacementLayer(BaseTunerLayer):
    """
    Rule for methods that train a copy of the layer itself, such as of normalisation layers.

    The copies stand in the one container of `adapter_layer_names`. With several active adapters the last one counts.
    """

    changes_weight = False

    def _copies(self) -> nn.ModuleDict:
        return self._modules[self.adapter_layer_names[0]]

    @classmethod
    def prepare_adapter(cls, base: nn.Module, config: Any, **arguments: Any) -> Mapping[str, Any]:
        """Refuse to copy a layer whose weights accelerate keeps elsewhere; see `BaseTunerLayer.prepare_adapter`."""
        refuse_copy_of_offloaded(base)
        return super().prepare_adapter(base, config, **arguments)

    def make_adapter(self, adapter_name: str, config: Any, **arguments: Any) -> None:
        """Copy the base layer."""
        refuse_copy_of_offloaded(self.get_base_layer())
        self._copies()[adapter_name] = copy_module(self.get_base_layer()).requires_grad_(True)

    def follow(self, adapter_name: str, owner: "ReplacementLayer") -> None:
        """Copy the base layer around the parameters that the owner's copy has in the place of shared ones."""
        super().follow(adapter_name, owner)
        theirs = owner._copies()[adapter_name]
        shared = shared_places(self.get_base_layer(), owner.get_base_layer())
        copied, borrowed = copy_borrowing(
            self.get_base_layer(), {name: (theirs, there) for name, (_, there) in shared.items()}
        )
        self._copies()[adapter_name] = copied.requires_grad_(True)
        self.borrow(adapter_name, borrowed, owner)
        self._trainable_adapters.add(adapter_name)

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """None: the tensors of a copy stand in the checkpoint, whoever else holds them."""
        yield from ()

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Start from the base layer's values."""
        base = self.get_base_layer().state_dict()
        for key, tensor in self._copies()[adapter_name].state_dict().items():
            tensor.copy_(base[key])

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the copy."""
        return self._copies()[adapters[-1]](x, *args, **kwargs)

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Give the weight of the copy."""
        return getattr(self._copies()[adapter], self.weight_name)

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Give the bias of the copy."""
        return self._copies()[adapter].bias

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """The weight is replaced like the other tensors, see `merged_tensors`."""

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """What was replaced is put back."""

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Give the tensors of the copy."""
        return {key: tensor.detach().clone() for key, tensor in self._copies()[adapter].state_dict().items()}
