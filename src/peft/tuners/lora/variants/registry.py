# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The variants of LoRA by the names that they are registered under, and which of them a config asks for."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from ....anatomy.walking import adapter_modules
from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from .base import LoraVariant


_VARIANTS: dict[str, type[LoraVariant]] = {}
# fields that ask for variants by having a value, and variants that are asked for otherwise
_FIELDS: list[str] = []
_ASKED_OTHERWISE: list[type[LoraVariant]] = []


def register_variant(name: str) -> Callable[[type[LoraVariant]], type[LoraVariant]]:
    """
    Make a decorator that enters a variant.

    Args:
        name: the field of the config that asks for it, unless its `is_asked` looks at something else, such as the
            value of `init_lora_weights`.

    Raises:
        PeftValueError: if the name is taken.

    Example:

        >>> from peft.methods import LoraVariant, register_variant
        >>> @register_variant("use_nothing_else")
        ... class NothingElse(LoraVariant):
        ...     name = "plain LoRA by another name"
        >>> NothingElse.field
        'use_nothing_else'
    """

    def enter(variant_cls: type[LoraVariant]) -> type[LoraVariant]:
        if name in _VARIANTS:
            raise PeftValueError(f"a variant named {name!r} is registered already; choose another name")
        variant_cls.field = name
        _VARIANTS[name] = variant_cls
        if variant_cls.is_asked.__func__ is LoraVariant.is_asked.__func__:
            _FIELDS.append(name)
        else:
            _ASKED_OTHERWISE.append(variant_cls)
        return variant_cls

    return enter


def names_asked_for(config: LoraConfig) -> list[str]:
    """
    Name the variants that a config asks for.

    Args:
        config: an adapter's config.
    """
    return [name for name, variant_cls in _VARIANTS.items() if variant_cls.is_asked(config)]


def variants_by_field() -> dict[str, type[LoraVariant]]:
    """Give the variants that are registered, by the fields of a config that ask for them."""
    return dict(_VARIANTS)


def find_variant(config: LoraConfig) -> type[LoraVariant] | None:
    """
    Find the variant that a config asks for.

    Args:
        config: an adapter's config.

    Raises:
        PeftValueError: if it asks for two variants at once.
    """
    # asked for each layer, and nearly always the answer
    if not any(map(vars(config).get, _FIELDS)) and not any(v.is_asked(config) for v in _ASKED_OTHERWISE):
        return None
    asked = names_asked_for(config)
    if not asked:
        return None
    if len(asked) > 1:
        raise PeftValueError(f"{', '.join(asked)} cannot be combined; ask for one of them")
    return _VARIANTS[asked[0]]


def make_variant(
    layer: LowRankLayer, adapter: str, config: LoraConfig, target: str | None = None
) -> LoraVariant | None:
    """
    Make the strategy of an adapter, if its config asks for one.

    Args:
        layer: a layer that is about to get the adapter.
        adapter: name.
        config: its config.
        target: full name of the layer, if it is made for a model.
    """
    variant_cls = find_variant(config)
    if variant_cls is None or not variant_cls.applies_to(config, target):
        return None
    variant = variant_cls(layer, adapter, config)
    variant.target = target
    return variant


def check_beside(config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
    """
    Refuse an adapter that cannot stand in one model with the others that are there.

    Args:
        config: its config.
        others: name of each other adapter -> its config.

    Raises:
        PeftValueError: in that case, or if the config asks for two variants at once.
    """
    variant_cls = find_variant(config)
    if variant_cls is not None:
        variant_cls.check_beside(config, others)
    for other in others.values():
        asked_cls = find_variant(other) if isinstance(other, LoraConfig) else None
        if asked_cls is not None:
            asked_cls.check_beside(other, {"the new one": config})


def check_targets(
    config: LoraConfig,
    targets: Mapping[str, tuple[nn.Module, nn.Module, int]],
    shared: Iterable[Collection[str]],
) -> None:
    """
    Refuse a variant where it cannot work, before anything is changed.

    Args:
        config: the adapter's config.
        targets: name of a module that gets factors of its own -> base layer, module as it stands there, rank.
        shared: for each weight that several modules hold, the names of those that do not follow one of them.

    Raises:
        PeftValueError: for a target that the variant does not work for, or what else it says.
    """
    variant_cls = find_variant(config)
    if variant_cls is None:
        return
    for target, (base, layer, rank) in targets.items():
        refusal = variant_cls.refusal(config, target, base, layer, rank)
        if refusal is not None:
            raise type(refusal)(f"{target!r}: {refusal}")
    apart = [holders for holders in shared if len(holders) > 1 and set(holders) & set(targets)]
    if variant_cls.changes_base() and apart:
        raise PeftValueError(
            f"{variant_cls.name} changes the weight that {', '.join(map(repr, sorted(apart[0])))} share, for all of "
            "them; set ensure_weight_tying=True where all of them can follow, or leave it out"
        )


def penalties(model: nn.Module, variant_cls: type[LoraVariant], adapters: Collection[str]) -> Iterator[torch.Tensor]:
    """
    Yield what the adapters of a variant add to a loss, for each layer that has one of them.

    Args:
        model: a model with adapters.
        variant_cls: the variant; its `penalty` is given the layer and the name of the adapter.
        adapters: names.
    """
    for _, layer in adapter_modules(model):
        for name in adapters:
            variant = getattr(layer, "variants", {}).get(name)
            if isinstance(variant, variant_cls) and layer.source(name) is layer:
                yield variant.penalty(layer, name)


def attach_variants(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Let the variants of an adapter do what they have to do on the model."""
    if find_variant(config) is not None:
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
