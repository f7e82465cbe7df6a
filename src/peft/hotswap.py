# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Writing another adapter's tensors into the place of one that a model has, so that it need not be compiled again."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .anatomy.matching import get_pattern_key, pattern_lookup
from .checkpoints.assignment import live_tensors, one_value_per_tensor
from .checkpoints.checks import not_finite
from .checkpoints.keys import adapter_key_map, read_forms
from .checkpoints.load_report import LoadReport
from .checkpoints.read_file import load_peft_weights
from .config import PeftConfig
from .layers.undo import keep_values, on_failure
from .registry import PeftType
from .surgery.slots import without_collecting
from .surgery.transaction import all_or_nothing
from .tuners.families.ranks import RankAxis
from .tuners.lora.config import LoraConfig
from .tuners.lora.layer import LoraLayer, ParamWrapper
from .tuners.lora.model import layers_by_names
from .tuners.lora.starts import changes_base
from .utils.error import PeftRuntimeError, PeftValueError
from .utils.warning import warn
from .utils.wrapped_names import plain_name, renamed


__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "LoraConfig",
    "LoraLayer",
    "PeftConfig",
    "PeftType",
    "check_hotswap_configs_compatible",
    "get_pattern_key",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
]

# methods whose adapters can be swapped -> fields of their configs that say how tensors are used, so must not change
CONFIG_KEYS_TO_CHECK = {
    PeftType.LORA: [
        "use_rslora",
        "lora_dropout",
        "alpha_pattern",
        "use_dora",
        "alora_invocation_tokens",
        "use_qalora",
        "qalora_group_size",
        "use_bdlora",
        "kasa_config",
        "velora_config",
        "monteclora_config",
        "arrow_config",
    ]
}

# what a config says about ranks and scalings, which is all that a swap changes in it
_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """
    Refuse two adapters that cannot take each other's place.

    Args:
        config0: config of one.
        config1: config of the other.

    Raises:
        PeftValueError: if the methods differ, or are not LoRA, or compute with their tensors in different ways.

    Example:

        >>> from peft import LoraConfig
        >>> from peft.utils.hotswap import check_hotswap_configs_compatible
        >>> check_hotswap_configs_compatible(LoraConfig(r=4), LoraConfig(r=8))
    """
    methods = [getattr(config.peft_type, "value", config.peft_type) for config in (config0, config1)]
    unknown = [method for method in methods if method not in CONFIG_KEYS_TO_CHECK]
    if unknown:
        raise PeftValueError(f"adapters of LoRA can be swapped in place, found {unknown[0]}; use load_adapter instead")
    if methods[0] != methods[1]:
        raise PeftValueError(f"an adapter of {methods[0]} cannot take the place of one of {methods[1]}")
    for key in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        values = getattr(config0, key), getattr(config1, key)
        if values[0] != values[1]:
            raise PeftValueError(
                f"the two adapters differ in {key} ({values[0]!r} and {values[1]!r}), so one cannot take the place of "
                "the other; use load_adapter and set_adapter instead"
            )
    for config in (config0, config1):
        if changes_base(config.init_lora_weights):
            raise PeftValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes base weights, which a swap leaves alone; "
                "save the adapter with path_initial_model_for_weight_conversion to make plain LoRA of it"
            )


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Put an adapter from a folder or from the hub into the place of one that the model has.

    Tensors are written to, so a compiled model need not be compiled again, and what is tied stays tied. An adapter of
    another rank needs `prepare_model_for_compiled_hotswap` for that. If anything is refused, nothing is changed.

    Args:
        model: a `PeftModel`, compiled or not.
        model_name_or_path: folder, or hub id.
        adapter_name: name of the adapter to replace.
        torch_device: where the file is read to; an accelerator if there is one.
        kwargs: `subfolder`, `revision`, `token`, ... for the hub.

    Raises:
        PeftValueError: if the two adapters cannot take each other's place; if one is merged.
        PeftRuntimeError: if there is no such adapter, or tensors of the new one have no place in it.

    Example:

        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.utils.hotswap import hotswap_adapter
        >>> def make_model():
        ...     torch.manual_seed(0)
        ...     net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        ...     return net, get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> (_, trained), folder = make_model(), tempfile.mkdtemp()
        >>> torch.nn.init.ones_(trained.get_base_model()[0].lora_B["default"].weight).sum().item()
        32.0
        >>> trained.save_pretrained(folder)
        >>> _, model = make_model()
        >>> hotswap_adapter(model, folder, "default")
        >>> torch.equal(model(torch.ones(1, 4)), trained(torch.ones(1, 4)))
        True
    """
    name = os.fspath(model_name_or_path)
    config = PeftConfig.from_pretrained(name, **kwargs)
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise PeftRuntimeError(
            f"there is no adapter {adapter_name!r} to replace; the model has {', '.join(map(repr, configs)) or 'none'}"
        )
    check_hotswap_configs_compatible(configs[adapter_name], config)
    weights = load_peft_weights(name, device=torch_device, **kwargs)
    hotswap_adapter_from_state_dict(model, weights, adapter_name, config)


@without_collecting
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """
    Put the tensors of another adapter into the place of those of an adapter; see `hotswap_adapter`.

    Layers that the other adapter leaves alone get factors of zeros.

    Args:
        model: a `PeftModel`, or a model with injected adapters; compiled or not.
        state_dict: key -> tensor; keys are those of checkpoints, or of the model's state dict.
        adapter_name: name of the adapter to replace.
        config: the other adapter's config, which says ranks and scalings.
        parameter_prefix: what names of the method's tensors start with (kept for callers of the released package).

    Raises:
        PeftValueError: if the adapter is merged, or a tensor is not finite.
        PeftRuntimeError: if a tensor has no place in the adapter, or another shape; if one is missing that is no
            factor; if a compiled model has too little room for the rank.
    """
    is_compiled, model = _is_compiled(model), getattr(model, "_orig_mod", model)
    layers = [(names, layer) for names, layer in layers_by_names(model) if layer.has_adapter(adapter_name)]
    if any(adapter_name in layer.merged_adapters for _, layer in layers):
        raise PeftValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before it is replaced")
    values, tensors = _values(model, state_dict, adapter_name)
    padded = {id(tensor) for _, layer in layers for _, tensor in _factors(layer, adapter_name, only_padded=True)}
    factors = {id(tensor): place for _, layer in layers for place, tensor in _factors(layer, adapter_name)}
    fitted = {
        key: _fit(key, values.get(key), tensor, factors.get(id(tensor)), id(tensor) in padded)
        for key, tensor in tensors.items()
    }
    grown = [key for key, value in fitted.items() if value.shape != tensors[key].shape]
    if grown and is_compiled:
        raise PeftRuntimeError(
            f"{grown[0]!r} and others would have another shape ({tuple(tensors[grown[0]].shape)} now, then "
            f"{tuple(fitted[grown[0]].shape)}), and the model is compiled; call prepare_model_for_compiled_hotswap "
            "with the greatest rank before compiling it. Nothing was changed"
        )
    with all_or_nothing(model):
        with torch.no_grad():
            for key, value in fitted.items():
                tensor = tensors[key]
                keep_values([tensor])
                if value.shape == tensor.shape:
                    tensor.copy_(value)
                else:  # the parameter stays, and with it what is tied
                    tensor.data = value.to(tensor.device, tensor.dtype)
        rank_of, alpha_of = pattern_lookup(config.rank_pattern), pattern_lookup(config.alpha_pattern)
        for names, layer in layers:
            if layer.source(adapter_name) is layer:
                _set_scaling(layer, adapter_name, rank_of(names, config.r), alpha_of(names, config.lora_alpha))
                _note_sizes(layer, adapter_name)
        getattr(model, "load_reports", {}).pop(adapter_name, None)  # it was about the tensors that are gone
        present = (getattr(model, "peft_config", None) or {}).get(adapter_name)
        for field in _RANK_FIELDS if present is not None else ():
            setattr(present, field, getattr(config, field))


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """
    Make room for adapters of greater ranks, and keep scalings as tensors, so that swapping needs no new compilation.

    To be called before `torch.compile`. The model computes what it did: the additional ranks are zeros.

    Args:
        model: a `PeftModel`, or a model with injected adapters, of LoRA.
        target_rank: greatest rank of the adapters to come; left out, there is room for the present ranks.
        config: config, or name -> config, such as `model.peft_config`: its ranks become `target_rank`, of which they
            may not have more. What is saved has the ranks that the adapter has.
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        PeftValueError: if there is no LoRA layer, a rank is greater than `target_rank`, or the model is compiled.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.utils.hotswap import prepare_model_for_compiled_hotswap
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> prepare_model_for_compiled_hotswap(model, target_rank=3)
        >>> tuple(net[0].lora_A["default"].weight.shape)
        (3, 4)
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise PeftValueError(f"check_compiled must be 'error', 'warn' or 'ignore', found {check_compiled!r}")
    if check_compiled != "ignore" and _is_compiled(model):
        text = "the model is compiled already, and would be compiled again; prepare it before torch.compile"
        if check_compiled == "error":
            raise PeftValueError(text)
        warn(text)
    owners = [
        (names[0], layer, adapter)
        for names, layer in layers_by_names(getattr(model, "_orig_mod", model))
        for adapter in sorted(layer.available_adapters)
        if layer.source(adapter) is layer
    ]
    if not owners:
        raise PeftValueError("the model has no LoRA layer to prepare; put the first adapter in before this call")
    if target_rank is not None:
        _check_room(owners, target_rank, config)
    configs = _named(config).values() if target_rank is not None else ()
    with all_or_nothing(model):
        for _, layer, adapter in owners:
            for place, tensor in _factors(layer, adapter) if target_rank is not None else ():
                keep_values([tensor])
                tensor.data = place.pad(tensor.detach(), place.length(target_rank))
            _note_sizes(layer, adapter)
            scaling = layer.scaling[adapter]
            if not isinstance(scaling, torch.Tensor):
                layer.scaling[adapter] = torch.tensor(scaling, device=layer.stored_weight().device)
    for other in configs:
        other.r, other.rank_pattern = target_rank, dict.fromkeys(other.rank_pattern or {}, target_rank)


def _check_room(
    owners: list[tuple[str, LoraLayer, str]], target_rank: int, config: LoraConfig | dict[str, LoraConfig] | None
) -> None:
    """Refuse what would not fit, before anything is changed."""
    for name, layer, adapter in owners:
        if layer.r[adapter] > target_rank:
            raise PeftValueError(
                f"adapter {adapter!r} has rank {layer.r[adapter]} in {name!r}, which is more than "
                f"target_rank={target_rank}; nothing was changed"
            )
        groups = layer.rank_axis("lora_B").groups
        if target_rank % groups:
            raise PeftValueError(
                f"{name!r} is a convolution of {groups} groups, which have equal shares of the ranks, and target_rank="
                f"{target_rank} is no multiple of that; nothing was changed"
            )
        variant = layer.variants.get(adapter)
        if variant is not None and not variant.has_room:
            raise PeftValueError(
                f"adapter {adapter!r} is {variant.name}, whose tensors have no room for other ranks than its own; "
                "leave target_rank out and swap adapters of one rank"
            )
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            raise PeftValueError(
                f"{name!r} has a factor per expert in one tensor, to which no ranks can be added; leave target_rank "
                "out and swap adapters of one rank"
            )
    for name, other in _named(config).items():
        rank = max([other.r, *(other.rank_pattern or {}).values()])
        if rank > target_rank:
            raise PeftValueError(f"{name} has rank {rank}, which is more than target_rank={target_rank}")


def _named(config: LoraConfig | dict[str, LoraConfig] | None) -> dict[str, LoraConfig]:
    return config if isinstance(config, dict) else {} if config is None else {"config": config}


def _factors(layer: LoraLayer, adapter: str, only_padded: bool = False) -> Iterator[tuple[RankAxis, nn.Parameter]]:
    """Yield the factors that an adapter has in a layer, with the place of their ranks."""
    if layer.source(adapter) is not layer or (only_padded and not isinstance(layer.scaling[adapter], torch.Tensor)):
        return
    for attribute, _ in layer.factor_layout:
        held = layer._modules[attribute]
        value = held[adapter]
        yield layer.rank_axis(attribute), value.weight if isinstance(value, nn.Module) else value


def _values(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Find the place of each tensor of a state dict; give new values and present tensors by key in the model."""
    places = adapter_key_map(model, adapter_name)
    live = {place.key: saved for saved, place in reversed(places.items()) if not place.transposed}
    state_dict = renamed(state_dict, plain_name)
    content = read_forms(
        model, adapter_name, renamed(state_dict, lambda key: key if key in places else live.get(key, key))
    )
    unexpected = [key for key in content if key not in places]
    if unexpected:
        raise PeftRuntimeError(
            f"{len(unexpected)} tensors have no place in adapter {adapter_name!r}, the first is {unexpected[0]!r}; "
            "nothing was changed. The first adapter of a model that is to be swapped must have all targets of those "
            "to come"
        )
    held = live_tensors(model, {place.key for place in places.values()})
    first: dict[int, str] = {}  # tied modules hold one tensor under several keys
    for place in places.values():
        first.setdefault(id(held[place.key]), place.key)
    found = {saved: content[saved] for saved in places if saved in content}
    values, tied, overruled = one_value_per_tensor(found, places, held)
    report = LoadReport(adapter_name, not_finite=not_finite(content), tied=tied, overruled=overruled)
    report.refuse()
    report.warn()
    return {first[id(held[key])]: value for key, value in values.items()}, {key: held[key] for key in first.values()}


def _fit(
    key: str, value: torch.Tensor | None, tensor: torch.Tensor, place: RankAxis | None, is_padded: bool
) -> torch.Tensor:
    """Give a value the shape that it will have in the model; a factor that is missing is one of zeros."""
    if value is None:
        if place is None:
            raise PeftRuntimeError(f"the other adapter lacks {key!r}; nothing was changed")
        return torch.zeros_like(tensor)
    if value.shape == tensor.shape:
        return value
    axis = None if place is None else place.axis
    if axis is None or _without(value.shape, axis) != _without(tensor.shape, axis):
        raise PeftRuntimeError(
            f"{key!r} has the shape {tuple(tensor.shape)}, the other adapter has {tuple(value.shape)}; nothing was "
            "changed. It was made for another base model"
        )
    if is_padded and value.shape[axis] < tensor.shape[axis]:
        return place.pad(value, tensor.shape[axis])
    return value


def _without(shape: torch.Size, axis: int) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != axis)


def _set_scaling(layer: LoraLayer, adapter: str, rank: int, alpha: float) -> None:
    """Note an adapter's rank, and its scaling, which is computed as it was for the adapter before."""
    layer.r[adapter], layer.lora_alpha[adapter] = rank, alpha
    scaling = alpha / (math.sqrt(rank) if layer.use_rslora[adapter] else rank)
    if isinstance(layer.scaling[adapter], torch.Tensor):
        before = layer.scaling[adapter].clone()
        on_failure(lambda: layer.scaling[adapter].copy_(before))
        layer.scaling[adapter].fill_(scaling)
    else:
        layer.scaling[adapter] = scaling


def _note_sizes(layer: LoraLayer, adapter: str) -> None:
    """Let factors that are layers say what sizes they have now."""
    for attribute, _ in layer.factor_layout:
        factor = layer._modules[attribute][adapter]
        if isinstance(factor, nn.Linear):
            factor.out_features, factor.in_features = factor.weight.shape
        elif hasattr(factor, "groups"):  # a convolution
            factor.out_channels, factor.in_channels = factor.weight.shape[0], factor.weight.shape[1] * factor.groups


def _is_compiled(model: nn.Module) -> bool:
    """Say whether a model, or a module of it, was given to `torch.compile`."""
    return any(
        "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None
        for module in model.modules()
    )
