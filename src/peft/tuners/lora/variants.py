# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What an adapter of LoRA may do otherwise than LoRA: strategies, by the field of `LoraConfig` that asks for them.

A variant is one file with a subclass of `LoraVariant`, and one line in `VARIANTS`. A layer holds one such object per
adapter that has a variant, and asks it for what differs; adapters without a variant are not asked.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...anatomy.walking import adapter_modules
from ...utils.error import PeftNotImplementedError, PeftValueError


if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


# field of the config -> where the strategy is, which is imported when an adapter asks for it
VARIANTS = {
    "use_dora": ".dora:Dora",
    "alora_invocation_tokens": ".alora:ActivatedLora",
}

# fields that ask for variants of later versions of this package
_PLANNED = ("velora_config", "monteclora_config", "arrow_config", "kasa_config", "use_bdlora")


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

    def __init__(self, layer: "LoraLayer", adapter: str, config: "LoraConfig") -> None:
        if not self.supports(layer):
            raise PeftValueError(
                f"{self.name} does not exist for {type(layer.get_base_layer()).__name__} layers"
                f"{' as they are adapted here' if isinstance(layer.get_base_layer(), nn.Linear) else ''}; narrow the "
                "targets, or leave the variant out"
            )

    @classmethod
    def supports(cls, layer: "LoraLayer") -> bool:
        """Say whether the variant exists for a layer."""
        return True

    # ------------------------------------------------------------------------------------------------------- tensors
    def make(self, layer: "LoraLayer", adapter: str, config: "LoraConfig") -> None:
        """Make the tensors that the adapter has beside its factors, without values, in `layer.container(name)`."""

    def start(self, layer: "LoraLayer", adapter: str, init_lora_weights: bool | str) -> None:
        """Give all of the adapter's tensors the values that they start with."""
        layer.start_factors(adapter, init_lora_weights)

    def saved_key(self, key: str) -> str:
        """Give the key in a checkpoint of a tensor, from the one that is usual."""
        return key

    def adapter_aliases(self, layer: "LoraLayer", adapter: str) -> Iterator[tuple[str, str, bool]]:
        """Yield what a checkpoint holds for a layer that follows, beside the factors; see `BaseTunerLayer`."""
        yield from ()

    def attach(self, model: nn.Module, adapter: str, config: "LoraConfig") -> None:
        """Do what has to be done on the model, once the adapter is in it; it is called for each layer."""

    def detach(self, adapter: str) -> None:
        """Undo `attach`."""

    def forget(self) -> None:
        """Drop what was computed and kept; the layer changes between training and evaluation."""

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self, layer: "LoraLayer", adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
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
        self, layer: "LoraLayer", adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
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
    def check_mergeable(self, layer: "LoraLayer", adapter: str) -> None:
        """Raise if the adapter cannot be merged."""

    def prepare_merge(self, layer: "LoraLayer", adapter: str) -> None:
        """Compute what needs the base weight as it is before any adapter is merged."""

    def merge_weight_(self, layer: "LoraLayer", adapter: str, weight: torch.Tensor) -> None:
        """Apply the adapter to a weight of the base layer's layout, in place."""
        layer.add_delta_(adapter, weight, 1.0)

    def unmerge_weight_(self, layer: "LoraLayer", adapter: str, weight: torch.Tensor) -> None:
        """Undo `merge_weight_`."""
        layer.add_delta_(adapter, weight, -1.0)

    def can_unmerge(self) -> bool:
        """Say whether `unmerge_weight_` can undo `merge_weight_`; if not, a copy of the weight is kept."""
        return True

    def supports_lora_conversion(self) -> bool:
        """Say whether the adapter can be converted to plain LoRA."""
        return False


def variant_field(config: "LoraConfig") -> str | None:
    """
    Find the field by which a config asks for a variant.

    Args:
        config: an adapter's config.

    Raises:
        PeftValueError: if it asks for two variants at once.
        PeftNotImplementedError: if this version does not have the variant.
    """
    asked = [field for field in VARIANTS if getattr(config, field)]
    planned = [field for field in _PLANNED if getattr(config, field)]
    if len(asked) + len(planned) > 1:
        raise PeftValueError(f"{', '.join(asked + planned)} cannot be combined; ask for one of them")
    if planned:
        raise PeftNotImplementedError(f"LoRA of this version does not have: {planned[0]}; leave it out")
    return asked[0] if asked else None


def make_variant(layer: "LoraLayer", adapter: str, config: "LoraConfig") -> LoraVariant | None:
    """
    Make the strategy of an adapter, if its config asks for one.

    Args:
        layer: a layer that is about to get the adapter.
        adapter: name.
        config: its config.
    """
    field = variant_field(config)
    if field is None:
        return None
    module, _, name = VARIANTS[field].partition(":")
    return getattr(import_module(module, __package__), name)(layer, adapter, config)


def attach_variants(model: nn.Module, adapter: str, config: "LoraConfig") -> None:
    """Let the variants of an adapter do what they have to do on the model."""
    if variant_field(config) is not None:
        for variant in _variants_of(model, [adapter]):
            variant.attach(model, adapter, config)


def detach_variants(model: nn.Module, adapters: Iterable[str]) -> None:
    """Undo `attach_variants`."""
    for adapter in adapters:
        for variant in _variants_of(model, [adapter]):
            variant.detach(adapter)


def _variants_of(model: nn.Module, adapters: list[str]) -> list[LoraVariant]:
    layers = [module for _, module in adapter_modules(model) if getattr(module, "variants", None)]
    return [layer.variants[adapter] for layer in layers for adapter in adapters if adapter in layer.variants]
