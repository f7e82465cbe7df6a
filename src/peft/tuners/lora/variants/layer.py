# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The side of a layer that has variants of LoRA: it asks them for what differs from LoRA."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..low_rank import LowRankLayer
from .base import LoraVariant


class VariantLayer(LowRankLayer):
    """
    A layer of which some adapters may be other than plain LoRA.

    Attributes:
        variants: adapter name -> its strategy, for those adapters.
    """

    variants: dict[str, LoraVariant]

    def follow(self, adapter_name: str, owner: "VariantLayer") -> None:
        """Take an adapter from another layer, and its strategy; see `LowRankLayer.follow`."""
        super().follow(adapter_name, owner)
        if adapter_name in owner.variants:
            self.variants[adapter_name] = owner.variants[adapter_name]

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings; see `BaseTunerLayer.remove_adapter`.

        Args:
            adapter_name: name.
        """
        super().remove_adapter(adapter_name)
        variant = self.variants.pop(adapter_name, None)
        if variant is not None:
            variant.detach(adapter_name)

    # -------------------------------------------------------------------------------------------------------- saving
    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield keys of an adapter's tensors; see `BaseTunerLayer.adapter_keys`."""
        variant = self.variants.get(adapter_name)
        for saved, live in super().adapter_keys(adapter_name):
            yield saved if variant is None else variant.saved_key(saved), live

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """Yield the keys of tensors that this layer takes from an owner; see `BaseTunerLayer.adapter_aliases`."""
        yield from super().adapter_aliases(adapter_name)
        if adapter_name in self._owners and adapter_name in self.variants:
            yield from self.variants[adapter_name].adapter_aliases(self, adapter_name)

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let a variant make room for another form of its tensors; see `AdapterModule.prepare_to_load`."""
        if adapter_name in self.variants and adapter_name not in self._owners:
            self.variants[adapter_name].prepare_to_load(self, adapter_name, tensors)

    def _written_out(self, name: str, adapter: str) -> torch.Tensor:
        """Give the matrix that a factor stands for; that of an owner is written out already."""
        factor = super()._written_out(name, adapter)
        if adapter not in self.variants or adapter in self._owners:
            return factor
        return self.variants[adapter].written_out(self, adapter, name, factor)

    def keeps_matrices(self, adapter: str) -> bool:
        """Say whether the variant, if there is one, takes the factors for what they are."""
        variant = self.variants.get(adapter)
        if variant is None:
            return True
        factors = zip(self.factor_names, self.factor_weights(adapter), strict=True)
        return all(variant.written_out(self, adapter, name, factor) is factor for name, factor in factors)

    # ------------------------------------------------------------------------------------------------------- forward
    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with adapters that it has; see `AdditiveLayer.adapter_forward`."""
        if not self.variants:
            return super().adapter_forward(adapters, x, *args, **kwargs)
        return self.adapted(adapters, x, *args, **kwargs)

    def adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with adapters, of which some may be other than plain LoRA; see `LowRankLayer.adapted`."""
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        *earlier, adapter = adapters
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.forward(self, adapter, x, earlier, *args, **kwargs)
        result = self.adapted(earlier, x, *args, **kwargs)
        return (result + self.delta_forward(adapter, x)).to(result.dtype)

    def forward_rows(
        self, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute some samples of a batch with one adapter; see `BaseTunerLayer.forward_rows`."""
        if adapter in self.variants:
            return self.variants[adapter].forward_rows(self, adapter, rows, x, *args, **kwargs)
        return super().forward_rows(adapter, rows, x, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Switch between training and evaluation; see `torch.nn.Module.train`."""
        for variant in self.variants.values():
            variant.forget()
        return super().train(mode)

    # ------------------------------------------------------------------------------------------------------- merging
    def check_mergeable(self, adapter_name: str) -> None:
        """Refuse what a variant cannot merge; see `LowRankLayer.check_mergeable`."""
        if adapter_name in self.variants:
            self.variants[adapter_name].check_mergeable(self, adapter_name)
        super().check_mergeable(adapter_name)

    def prepare_merge(self, adapter: str) -> None:
        """Let a variant compute what it needs the unchanged weight for; see `BaseTunerLayer.prepare_merge`."""
        source = self.source(adapter)  # whose tensors are merged, into the weight that all members of a tie share
        if adapter in source.variants:
            source.variants[adapter].prepare_merge(source, adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta, or what a variant has in its place."""
        if adapter in self.variants:
            self.variants[adapter].merge_weight_(self, adapter, weight)
        else:
            super().merge_weight_(adapter, weight)

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Subtract the delta, or undo what a variant has done in its place."""
        if adapter in self.variants:
            self.variants[adapter].unmerge_weight_(self, adapter, weight)
        else:
            super().unmerge_weight_(adapter, weight)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether the adapter only adds to the weight; a variant may do something else with it."""
        return adapter not in self.variants or self.variants[adapter].adds_delta

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the adapter can be taken out of a weight again; plain LoRA can."""
        return adapter not in self.variants or self.variants[adapter].can_unmerge()
