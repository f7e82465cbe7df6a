# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a variant of LoRA says: whether a config asks for it, what it refuses, and what it does otherwise than LoRA."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..starts import Start


class LoraVariant:
    """
    What one adapter of one layer does otherwise; by default, nothing.

    Every method is given the layer that has the adapter's tensors, but for `forward` and `forward_rows`, which are
    given the layer that computes: it may follow another one (`layer.source(adapter)`), whose object it shares.

    Args:
        layer: the layer, before it has the adapter's tensors.
        adapter: name.
        config: the adapter's config.

    Raises:
        PeftValueError: if the variant does not exist for that kind of layer.
    """

    name = "the variant"
    # the field of the config that asks for it; `register_variant` sets it
    field: str
    # fields of the config without which an adapter that was converted to LoRA would not do what this one does
    kept_by_conversion: tuple[str, ...] = ()

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        if not self.supports(layer):
            raise PeftValueError(
                f"{self.name} does not exist for {type(layer.get_base_layer()).__name__} layers"
                f"{' as they are adapted here' if isinstance(layer.get_base_layer(), nn.Linear) else ''}; narrow the "
                "targets, or leave the variant out"
            )

    @classmethod
    def is_asked(cls, config: LoraConfig) -> bool:
        """
        Say whether a config asks for the variant; by default, whether it has something in the field of that name.

        Args:
            config: an adapter's config.
        """
        return bool(getattr(config, cls.field, None))

    @classmethod
    def has_weighted_sum(cls, configs: Sequence[LoraConfig]) -> bool:
        """
        Say whether the effects of adapters add up as their deltas do, so that one can stand for several.

        Args:
            configs: those of the adapters, all of which ask for this variant.
        """
        return False

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the variant exists for a layer."""
        return True

    # ------------------------------------------------------------------------------------------------------- tensors
    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the tensors that the adapter has beside its factors, without values, in `layer.container(name)`."""

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """
        Give all of the adapter's tensors the values that they start with.

        Args:
            layer: the layer.
            adapter: name.
            start: how the factors start.
        """
        start.start(layer, adapter)

    def saved_key(self, key: str) -> str:
        """Give the key in a checkpoint of a tensor, from the one that is usual."""
        return key

    def adapter_aliases(self, layer: LowRankLayer, adapter: str) -> Iterator[tuple[str, str, bool]]:
        """Yield what a checkpoint holds for a layer that follows, beside the factors; see `BaseTunerLayer`."""
        yield from ()

    def attach(self, model: nn.Module, adapter: str, config: LoraConfig) -> None:
        """Do what has to be done on the model, once the adapter is in it; it is called for each layer."""

    def detach(self, adapter: str) -> None:
        """Undo `attach`."""

    def forget(self) -> None:
        """Drop what was computed and kept; the layer changes between training and evaluation."""

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute the layer with the adapter on top of those that come earlier.

        Args:
            layer: the layer that computes.
            adapter: name.
            x: its input.
            earlier: adapters whose result `layer.adapted(earlier, x, ...)` is to be built on.
            args: other arguments of the base layer.
            kwargs: likewise.

        Returns:
            The output, in the type that `layer.adapted` gives.
        """
        result = layer.adapted(earlier, x, *args, **kwargs)
        return (result + layer.delta_forward(adapter, x)).to(result.dtype)

    def forward_rows(
        self, layer: LowRankLayer, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute the samples of a batch that have this adapter.

        Args:
            layer: the layer that computes.
            adapter: name.
            rows: their numbers in the batch.
            x: input of the whole batch.
            args: other arguments of the base layer.
            kwargs: likewise.

        Raises:
            PeftValueError: if the variant cannot do that.
        """
        return layer.adapter_forward([adapter], x[rows], *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- merging
    def check_mergeable(self, layer: LowRankLayer, adapter: str) -> None:
        """Raise if the adapter cannot be merged."""

    def prepare_merge(self, layer: LowRankLayer, adapter: str) -> None:
        """Compute what needs the base weight as it is before any adapter is merged."""

    def merge_weight_(self, layer: LowRankLayer, adapter: str, weight: torch.Tensor) -> None:
        """Apply the adapter to a weight of the base layer's layout, in place."""
        layer.add_delta_(adapter, weight, 1.0)

    def unmerge_weight_(self, layer: LowRankLayer, adapter: str, weight: torch.Tensor) -> None:
        """Undo `merge_weight_`."""
        layer.add_delta_(adapter, weight, -1.0)

    def can_unmerge(self) -> bool:
        """Say whether `unmerge_weight_` can undo `merge_weight_`; if not, a copy of the weight is kept."""
        return True

    def supports_lora_conversion(self) -> bool:
        """Say whether plain LoRA can stand for what merging the adapter changes of the weight."""
        return True
