# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a variant of LoRA says: whether a config asks for it, what it refuses, and what it does otherwise than LoRA."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ....anatomy.kinds import is_linear
from ....layers.fused.terms import LowRank
from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..starts import Start, find_start
from ..whole_weight import OnWholeWeight


class LoraVariant:
    """
    What one adapter of one layer does otherwise; by default, nothing.

    Every method is given the layer that has the adapter's tensors, but for `forward` and `forward_rows`, which are
    given the layer that computes: it may follow another one (`layer.source(adapter)`), whose object it shares.

    Args:
        layer: the layer, before it has the adapter's tensors.
        adapter: name.
        config: the adapter's config.

    Attributes:
        adds_delta: whether all that it does to the weight is to add the product of the factors as `written_out` gives
            them, whatever the weight is. It then merges, unmerges and follows tied layers by that.
        has_room: whether factors may have more ranks than the adapter, filled with zeros.

    Raises:
        PeftValueError: if the variant does not exist for that kind of layer.
    """

    adds_delta = False
    has_room = True
    # full name of the target, where the layer was made for one
    target: str | None = None
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

    # ------------------------------------------------------------------------------- what is asked before any change
    @classmethod
    def check_beside(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """
        Refuse to stand in one model with other adapters; asked when this one is added, and when another one is.

        Args:
            config: the adapter's config.
            others: name of each other adapter of the model -> its config.

        Raises:
            PeftValueError: in that case.
        """

    @classmethod
    def applies_to(cls, config: LoraConfig, target: str | None) -> bool:
        """
        Say whether a target gets the variant; one that does not is plain LoRA.

        Args:
            config: the adapter's config.
            target: full name; None if the layer is made by hand.
        """
        return True

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """
        Say what stands against adapting a target; asked for all targets before the model is changed.

        Args:
            config: the adapter's config.
            target: full name.
            base: its base layer.
            layer: what stands there: that, or the layer of other adapters around it.
            rank: rank of the factors.

        Returns:
            The exception to raise, or None.
        """
        return None

    @classmethod
    def changes_base(cls) -> bool:
        """Say whether starting an adapter changes base weights, which others that share them would see."""
        return False

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

    def written_out(self, layer: LowRankLayer, adapter: str, name: str, factor: torch.Tensor) -> torch.Tensor:
        """
        Give the matrix that a factor stands for in the delta.

        Args:
            layer: the layer.
            adapter: name.
            name: attribute that holds the factor.
            factor: the factor as it is kept.

        Returns:
            (r, in) for factor A, (out, r) for factor B.
        """
        return factor

    def saved_key(self, key: str) -> str:
        """Give the key in a checkpoint of a tensor, from the one that is usual."""
        return key

    def adapter_aliases(self, layer: LowRankLayer, adapter: str) -> Iterator[tuple[str, str, bool]]:
        """Yield what a checkpoint holds for a layer that follows, beside the factors; see `BaseTunerLayer`."""
        yield from ()

    def prepare_to_load(self, layer: LowRankLayer, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Make room for tensors of a checkpoint that have another form; see `AdapterModule.prepare_to_load`.

        Args:
            layer: the layer.
            adapter: name.
            tensors: key in the checkpoint -> tensor, of all layers.
        """

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
        return (result + self.term(layer, adapter, x)).to(result.dtype)

    def term(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute what the adapter adds to the output; a layer that follows has views of the factors as written out.

        Args:
            layer: the layer that computes.
            adapter: name.
            x: its input.
        """
        if layer.source(adapter) is layer:
            return self.delta_forward(layer, adapter, x)
        return layer.delta_forward(adapter, x)

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute the same for the layer that has the adapter's tensors.

        Args:
            layer: the layer.
            adapter: name.
            x: its input.
        """
        return layer.delta_forward(adapter, x)

    def fused_term(self, layer: LowRankLayer, term: LowRank) -> LowRank | None:
        """
        Declare what the adapter adds, so that the layer can be computed as one; None if it is nothing of that kind.

        Args:
            layer: the layer, which has the adapter's tensors itself.
            term: what plain LoRA would add.
        """
        return None

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
        """Say whether plain LoRA on the base model can stand for what merging the adapter changes of the weight."""
        return not self.changes_base()


class OfLinearLayers(LoraVariant):
    """A variant that exists for linear layers, quantised or not, that are called with their inputs."""

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is a linear one that is called."""
        return is_linear(layer.get_base_layer()) and not isinstance(layer, OnWholeWeight)

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Say that another kind of layer has no such variant; see `LoraVariant.refusal`."""
        if is_linear(base):
            return None
        return PeftValueError(f"{cls.name} does not exist for {type(base).__name__} layers; narrow the targets")


class OwnStart(OfLinearLayers):
    """One that starts a factor by itself, whatever `init_lora_weights` says of plain factors."""

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Refuse starts that need both factors as they make them, too; see `LoraVariant.refusal`."""
        if find_start(config.init_lora_weights).needs_matrix:
            return PeftValueError(
                f"{cls.name} starts one of the factors by itself, which does not go with "
                f"init_lora_weights={config.init_lora_weights!r}; use True, False or 'gaussian'"
            )
        return super().refusal(config, target, base, layer, rank)
