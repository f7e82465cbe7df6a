# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What merging has to know about a layer: its base weight, and what each adapter makes of that."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import nn

from ...anatomy.offload import tensor_of
from ...anatomy.walking import innermost_base_layer, stack_of
from ...utils.computed_weights import ComputedWeight, find_computed_weight
from ...utils.quantization_utils import QuantizationBackend
from ..adapter_module import AdapterModule
from .state import MergeState, Sharing


class MergeableLayer(AdapterModule, ABC):
    """
    A layer around a base layer whose weight adapters can be merged into.

    The rule that a method follows says what an adapter makes of a weight; `merge_weight_` has to be there, and most
    of the others say by default what is true for nearly all methods.

    Attributes:
        weight_name: name of the base layer's parameter that is adapted.
        parameter_name: the same for layers that adapt a named parameter, whatever their base layer does with it.
        changes_weight: whether merging changes that parameter; False if it only replaces tensors (`merged_tensors`).
        is_mergeable: whether there are adapters that can be merged; False where no weight stands for what they do.
        quantization_backend: what the base layer's weight is quantised by; None if it is not.
        base_layer: the wrapped layer.
    """

    _base_names = ("base_layer",)

    weight_name: str = "weight"
    parameter_name: str | None = None
    changes_weight: bool = True
    is_mergeable: bool = True
    quantization_backend: QuantizationBackend | None = None

    _owners: dict[str, "MergeableLayer"]
    _merge_state: MergeState
    _sharing: Sharing | None

    # ---------------------------------------------------------------------------------------------- the base weight
    def get_base_layer(self) -> nn.Module:
        """Give the layer of the base model, below any number of adapter layers."""
        return innermost_base_layer(self)

    def stored_weight(self) -> torch.Tensor:
        """Give the tensor that holds the base layer's weight, quantised or not; None for layers without one."""
        return getattr(self.get_base_layer(), self.weight_name, None)

    def get_base_weight(self) -> torch.Tensor:
        """Give the weight of the base layer that is adapted; if it is quantised, as a dense matrix of its own."""
        backend = self.quantization_backend
        if backend is not None:
            return backend.get_base_weight(self.get_base_layer())
        return tensor_of(self.get_base_layer(), self.weight_name)

    def computed_weight(self) -> ComputedWeight | None:
        """Say how the base layer computes the weight that is merged into; None if it holds it, as most do."""
        if self.quantization_backend is not None or not self.changes_weight:
            return None
        return find_computed_weight(self.get_base_layer(), self.weight_name)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """
        Replace the values of the base weight; the parameter object stays, and with it every tie.

        A quantised weight is quantised anew and replaced; one that the layer computes is computed from other values.

        Args:
            weight_data: of the shape that `get_base_weight` gives.
        """
        computed = self.computed_weight()
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
        elif computed is not None:
            for name, values in computed.tensors_for(weight_data).items():
                attrgetter(name)(self.get_base_layer()).data = values
        else:
            self.stored_weight().data = weight_data

    def inner_weight(self) -> torch.Tensor:
        """Give the weight that this layer's adapters meet: the base weight as adapter layers inside leave it."""
        inner = self.base_layer
        if isinstance(inner, MergeableLayer) and inner.weight_name == self.weight_name:
            return inner.effective_weight()
        return self.get_base_weight()

    def effective_weight(self) -> torch.Tensor:
        """Compute the weight with what the active adapters do to it, here and in adapter layers inside."""
        weight = self.inner_weight()
        for adapter in self.adapters_to_apply():
            weight = self.source(adapter).weight_with(adapter, weight)
        return weight

    def layers_inside(self) -> Iterator["MergeableLayer"]:
        """Yield the adapter layers between this one and its base layer that adapt the same weight, outermost first."""
        return (inner for inner in stack_of(self.base_layer) if inner.weight_name == self.weight_name)

    # ------------------------------------------------------------------------------------------------- its adapters
    def source(self, adapter_name: str) -> "MergeableLayer":
        """Give the layer that has an adapter's tensors: this one, or the owner that it follows."""
        return self._owners.get(adapter_name, self)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight, in the order of merging."""
        return [name for layer, name in self._merge_state.contributions if layer is self]

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the base weight."""
        return bool(self._merge_state.contributions) and bool(self.merged_adapters)

    def adapters_to_apply(self) -> list[str]:
        """
        Name the adapters that have to be computed here: the active ones that are not in the base weight already.

        Where only adapters that are not active were merged, the weight stands for them and for nothing else.
        """
        if self._disable_adapters:
            return []
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if self._merge_state.contributions:
            merged = self.merged_adapters
            left = [name for name in active if name not in merged]
            return [] if merged and left == active else left
        return active

    # ---------------------------------------------------------------------------- what an adapter makes of a weight
    @abstractmethod
    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Apply an adapter to a weight of the base layer's layout, in place. Supplied by the rule."""

    @abstractmethod
    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Undo `merge_weight_`. Supplied by the rule."""

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether `unmerge_weight_` can undo `merge_weight_`; if not, a copy of the weight is kept for it."""
        return True

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute what merging an adapter would give; the weight itself stays as it is."""
        changed = weight.clone()
        self.prepare_merge(adapter)
        self.merge_weight_(adapter, changed)
        return changed

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """
        Compute what merging puts in the place of tensors of the base layer other than the weight, such as its bias.

        Returns:
            Name in the base layer -> new tensor; most methods change none.
        """
        return {}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Compute what an adapter makes of a bias of the base layer's shape; most methods leave it alone."""
        return bias

    def prepare_merge(self, adapter: str) -> None:
        """
        Compute what merging an adapter needs the base weight for, before others are merged into it.

        It is asked of every layer that shares the weight, also of those that follow the one with the tensors.
        """
        return

    def commutes_with(self, adapter: str, other: "MergeableLayer", other_adapter: str) -> bool:
        """
        Say whether an adapter and another one around the same base layer give the same in whichever order they come.

        Where they do not, the later one cannot be merged while the earlier one is active and not merged.

        Args:
            adapter: name of an adapter of this layer.
            other: this layer, or one inside it.
            other_adapter: name of an adapter of that layer.
        """
        return False

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise if this adapter cannot be merged into this base layer; by default every adapter can."""
        return

    def check_mergeable_together(self, adapters: Sequence[str]) -> None:
        """Raise if these adapters of the layer cannot all be merged into its base layer; by default they can."""
        return
