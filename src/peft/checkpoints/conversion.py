# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapters of experts that were linear layers, for models that keep the weights of all experts in one parameter.

Mixtral, Qwen-MoE and others had three linear layers per expert. transformers 5 holds the weights of all experts in two
parameters, `gate_up_proj` (experts, 2 * width, hidden) and `down_proj` (experts, hidden, width), and says in *weight
conversions* which layers have gone into which parameter. An adapter follows its weight. With the weights W1 and W3 of
an expert stacked, so are their deltas, and that is LoRA again, of twice the rank:

    [B1 A1]   [B1  0] [A1]
    [B3 A3] = [0  B3] [A3]

Nothing here is needed for models that transformers converts nothing for.
"""

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from ..anatomy.matching import dotted_endings, find_targets, matching_entry, pattern_lookup
from ..anatomy.walking import adapter_modules, bare_modules
from ..config import PeftConfig
from ..layers.base_layer import BaseTunerLayer
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME
from ..utils.error import PeftNotImplementedError, PeftValueError
from ..utils.peft_types import PeftType
from ..utils.warning import warn
from .keys import adapter_key_map, prefix_of


__all__ = [
    "FlattenDims",
    "PeftConcatenate",
    "PermuteDims",
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
    "get_model_conversion_mapping",
]


# ------------------------------------------------------------------------------------------ operations
class PermuteDims(ConversionOps):
    """
    Puts the dimensions of each tensor into another order.

    Args:
        dims: the dimensions in their new order.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the same names with tensors whose dimensions are permuted."""
        return {name: tensor.permute(*self.dims).contiguous() for name, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation that puts the dimensions back."""
        return PermuteDims(tuple(self.dims.index(i) for i in range(len(self.dims))))


class FlattenDims(ConversionOps):
    """
    Makes one dimension of several that follow each other.

    Args:
        dims: the dimensions, of which the first and the last count.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the same names with flattened tensors."""
        return {name: tensor.flatten(self.dims[0], self.dims[-1]) for name, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: the sizes are gone."""
        raise PeftNotImplementedError("FlattenDims cannot be reversed, since the sizes of the dimensions are not kept")


class PeftConcatenate(Concatenate):
    """Makes factor B of a parameter of experts from those of the layers that went into it: (experts, out, r) each."""

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the factor (all outs, all ranks * experts) under the name of the target."""
        return {self.get_target_pattern(target_patterns): _stacked_b([input_dict[name] for name in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: what was trained on the parameter need not fall into blocks."""
        raise PeftNotImplementedError("an adapter of fused experts cannot be split into one per layer")


def _stacked_a(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make one factor A of those of several layers, (experts, r, in) each; the ranks of an expert stay together."""
    return torch.cat(tuple(factors), dim=1).flatten(0, 1)


def _stacked_b(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make one factor B of those of several layers, (experts, out, r) each; in its columns the experts take turns."""
    blocks = torch.stack([torch.block_diag(*expert) for expert in zip(*factors, strict=True)])
    return blocks.permute(1, 2, 0).flatten(1, 2)


# ------------------------------------------------------------------------------------------ fused experts
class FusedExperts(NamedTuple):
    """
    A parameter that holds the weights of what were linear layers, several per expert.

    Attributes:
        parameter: its full name.
        layers: for each layer of an expert, such as `w1` and `w3`, the names that it has in expert 0, 1, ... Several
            names are for one layer, since modules around it may have been renamed too.
    """

    parameter: str
    layers: list[list[list[str]]]

    @property
    def all_layers(self) -> list[list[str]]:
        """The names of each layer of each expert."""
        return [names for of_expert in self.layers for names in of_expert]

    @property
    def kinds(self) -> set[str]:
        """What the layers of an expert are called."""
        return {_last_part(names[0]) for names in self.all_layers}


def _is_fusion(conversion: Any) -> bool:
    """Whether a conversion stacks the weights of linear layers, as LoRA's factors can be."""
    operations = getattr(conversion, "operations", ())
    return (
        [type(operation) for operation in operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        and [operation.dim for operation in operations] == [0, 1][: len(operations)]
        and all(source.endswith(".weight") for source in conversion.source_patterns)
    )


def _plain(pattern: str) -> str:
    """Take a pattern for names of weights as the ending of a name, from a dot on."""
    return "." + pattern.replace("\\.", ".").removeprefix(".")


def find_fused_experts(model: nn.Module, conversions: Sequence[Any]) -> list[FusedExperts]:
    """
    Find the parameters of a model that hold the weights of experts which were linear layers.

    Args:
        model: a model of transformers, with or without adapters.
        conversions: the model's weight conversions.
    """
    renamings = [
        (source, target)
        for conversion in conversions
        if isinstance(conversion, WeightRenaming)
        for source, target in zip(conversion.source_patterns, conversion.target_patterns, strict=False)
        if re.fullmatch(r"[\w.]+", source + target)
    ]

    def names(layer: str) -> list[str]:
        return list(dict.fromkeys([layer, *(layer.replace(target, source) for source, target in renamings if target)]))

    found = []
    for conversion in filter(_is_fusion, conversions):
        ending = _plain(conversion.target_patterns[0])
        sources = [_plain(source).removesuffix(".weight") for source in conversion.source_patterns]
        for module_name, module in bare_modules(model):
            for key, parameter in module._parameters.items():
                full = f".{module_name}.{key}"
                if full.endswith(ending) and parameter is not None and parameter.dim() == 3:
                    stem = full.removesuffix(ending)
                    layers = [
                        [names(f"{stem}{source}".replace("*", str(expert))[1:]) for expert in range(len(parameter))]
                        for source in sources
                    ]
                    found.append(FusedExperts(full[1:], layers))
    return found


def conversions_of(model: nn.Module) -> list[Any]:
    """
    Give the weight conversions of a model; none for models that are not of transformers.

    Args:
        model: a base model.
    """
    from transformers import PreTrainedModel

    return get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []


# ------------------------------------------------------------------------------------------ config
def convert_peft_config_for_transformers(
    peft_config: PeftConfig, model: nn.Module, conversions: Sequence[Any] | None
) -> None:
    """
    Let a config that names linear layers of experts target the parameters that hold their weights now.

    The config is changed: names move from `target_modules` to `target_parameters`, and where several layers went into
    one parameter, its rank is the sum of theirs. A name that modules of the model have too, such as `down_proj` of a
    shared expert, is left to them, unless the checkpoint that the config was read with has tensors for the experts.

    Args:
        peft_config: config of LoRA; others are left as they are.
        model: the base model.
        conversions: the model's weight conversions; see `get_model_conversion_mapping`.

    Raises:
        PeftValueError: if the config reaches a part only of what is one parameter now, or gives the layers that went
            into one parameter different scalings.

    Example:

        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from peft import LoraConfig
        >>> from peft.utils.transformers_weight_conversion import (
        ...     convert_peft_config_for_transformers, get_model_conversion_mapping
        ... )
        >>> base_config = MixtralConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1)
        >>> with torch.device("meta"):
        ...     model = MixtralForCausalLM(base_config)
        >>> config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "w1", "w2", "w3"])
        >>> convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
        >>> config.target_modules, sorted(config.target_parameters)
        ({'q_proj'}, ['down_proj', 'gate_up_proj'])
        >>> config.rank_pattern
        {'.*\\\\.gate_up_proj': 4}
    """
    if peft_config.peft_type != PeftType.LORA or not peft_config.target_modules or not conversions:
        return
    fused = find_fused_experts(model, conversions)
    if not fused:
        return
    wanted = copy.copy(peft_config)
    modules = [name for name, _ in bare_modules(model) if name]
    if wanted.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        wanted.target_modules = ".*"
        modules = [name for name, module in bare_modules(model) if isinstance(module, nn.Linear)]
    routers = _routers(model, fused)
    if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        # as in release 0.21.2; where the router is a linear layer to this day (Phimoe), only that is one
        converted = {name.rpartition(".")[0] for name in routers}
        fused = [experts for experts in fused if experts.parameter.rsplit(".", 2)[0] in converted]
    modules = [name for name in modules if name not in routers]
    of_modules = {_last_part(name) for name in find_targets(wanted, modules).names}
    in_checkpoint = _layers_in_checkpoint(peft_config)
    chosen, left = [], []
    for experts in fused:
        reached = [bool(find_targets(wanted, names).names) for names in experts.all_layers]
        if not any(reached):
            continue
        if not experts.kinds.isdisjoint(of_modules) and in_checkpoint.isdisjoint(chain(*experts.all_layers)):
            left.append(experts.parameter)
            continue
        if not all(reached):
            raise PeftValueError(
                f"target_modules={peft_config.target_modules!r} reaches a part only of the layers whose weights are "
                f"one parameter in this version of transformers: {experts.parameter!r} holds those of "
                f"{', '.join(sorted(experts.kinds))} of all experts. Target all of them, or none"
            )
        chosen.append(experts)
    if left and not in_checkpoint and not peft_config.target_parameters:
        names = sorted({_last_part(name) for name in left})
        warn(
            f"target_modules reaches modules only: the weights of experts that had layers of these names in earlier "
            f"versions of transformers are parameters now ({', '.join(left[:3])}{' ...' if len(left) > 3 else ''}). "
            f"To adapt them too, add target_parameters={names}"
        )
    if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        parents = {experts.parameter.rsplit(".", 2)[0] for experts in chosen}
        routers = [name for name in routers if name.rpartition(".")[0] in parents]
    routers = find_targets(wanted, routers).names
    if chosen or routers:
        _retarget(peft_config, model, modules, chosen, routers)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _routers(model: nn.Module, fused: Sequence[FusedExperts]) -> list[str]:
    """
    Find the modules that choose among experts.

    They were linear layers, and are modules of another kind now, which hold a matrix.
    """
    parents = {experts.parameter.rsplit(".", 2)[0] for experts in fused}
    return [
        name
        for name, module in bare_modules(model)
        if name.rpartition(".")[0] in parents
        and not isinstance(module, nn.Linear)
        and getattr(module._parameters.get("weight"), "ndim", 0) == 2
    ]


def _layers_in_checkpoint(config: PeftConfig) -> set[str]:
    """Give the names of the layers that have tensors in the checkpoint that a config was read with."""
    path = os.path.join(config.loaded_from or "", SAFETENSORS_WEIGHTS_NAME)
    if config.loaded_from is None or not os.path.isfile(path):
        return set()
    with safe_open(path, framework="pt") as file:
        return {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118


def _retarget(
    config: PeftConfig,
    model: nn.Module,
    modules: Sequence[str],
    chosen: Sequence[FusedExperts],
    routers: Sequence[str],
) -> None:
    """Move targets of a config from modules to parameters."""
    settings: dict[str, Any] = {experts.parameter: _rank_and_alpha(config, experts) for experts in chosen}
    if config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = _remaining_targets(config.target_modules, modules, chosen, routers)
    if config.inference_mode:  # it takes no part then, and parameters cannot have it
        config.lora_dropout = 0.0
    everything = [f"{name}.{key}" for name, module in bare_modules(model) for key in module._parameters]
    entries = _entries(settings, everything, parts=1)
    gates = _entries(dict.fromkeys(f"{name}.weight" for name in routers), everything, parts=2)
    config.target_parameters = {*(config.target_parameters or ()), *entries, *gates}
    rank_of, alpha_of = pattern_lookup(config.rank_pattern), pattern_lookup(config.alpha_pattern)
    ranks, alphas = {}, {}
    for entry, name in entries.items():
        pattern = entry if entry == name else rf".*\.{entry}"
        r, alpha = settings[name]
        if rank_of(name, config.r) != r:
            ranks[pattern] = r
        if alpha_of(name, config.lora_alpha) != alpha:
            alphas[pattern] = alpha
    config.rank_pattern = {**ranks, **_remaining_patterns(config.rank_pattern, modules, chosen)}
    config.alpha_pattern = {**alphas, **_remaining_patterns(config.alpha_pattern, modules, chosen)}


def _remaining_targets(
    wanted: Any, modules: Sequence[str], chosen: Sequence[FusedExperts], routers: Sequence[str]
) -> Any:
    """Leave out of `target_modules` what names layers only that modules no longer are."""
    if isinstance(wanted, str):
        return wanted if any(matching_entry(wanted, name) for name in modules) else set()
    layers = [name for experts in chosen for name in chain(*experts.all_layers)]
    gone = {ending for name in (*layers, *routers) for ending in dotted_endings(name)}
    gone -= {ending for name in modules for ending in dotted_endings(name)}
    return set(wanted) - gone


def _remaining_patterns(
    patterns: dict[str, Any] | None, modules: Sequence[str], chosen: Sequence[FusedExperts]
) -> dict[str, Any]:
    """Leave out of `rank_pattern` or `alpha_pattern` what is for layers only that modules no longer are."""
    layers = [name for experts in chosen for name in chain(*experts.all_layers)]
    matches = {pattern: pattern_lookup({pattern: True}) for pattern in patterns or {}}
    return {
        pattern: patterns[pattern]
        for pattern, lookup in matches.items()
        if lookup(modules, False) or not lookup(layers, False)
    }


def _entries(settings: Mapping[str, Any], everything: Sequence[str], parts: int) -> dict[str, str]:
    """
    Find short entries for `target_parameters`.

    Args:
        settings: full name of a parameter -> how it is adapted.
        everything: full names of all parameters.
        parts: of how many parts a short entry consists.

    Returns:
        Entry -> a parameter that it stands for. An entry is the last parts of names if all parameters that it names
        are to be adapted, and alike; else it is a full name.
    """
    groups: dict[str, list[str]] = {}
    for name in settings:
        groups.setdefault(".".join(name.split(".")[-parts:]), []).append(name)
    entries = {}
    for short, names in groups.items():
        all_named = sum(f".{name}".endswith(f".{short}") for name in everything) == len(names)
        if all_named and len({settings[name] for name in names}) == 1:
            entries[short] = names[0]
        else:
            entries.update((name, name) for name in names)
    return entries


def _rank_and_alpha(config: PeftConfig, experts: FusedExperts) -> tuple[int, float]:
    """
    Find the rank and the numerator of the scaling that a parameter of experts needs.

    Raises:
        PeftValueError: if one adapter cannot stand for those of the layers.
    """
    rank_of, alpha_of = pattern_lookup(config.rank_pattern), pattern_lookup(config.alpha_pattern)
    ranks, scalings, alphas = [], set(), []
    for of_expert in experts.layers:
        settings = {(rank_of(names, config.r), alpha_of(names, config.lora_alpha)) for names in of_expert}
        if len(settings) > 1:
            raise PeftValueError(
                f"rank_pattern or alpha_pattern tells experts apart whose {_last_part(of_expert[0][0])!r} are in one "
                f"parameter in this version of transformers, {experts.parameter!r}; all of them need the same values"
            )
        ((r, alpha),) = settings
        ranks.append(r)
        alphas.append(alpha)
        scalings.add(alpha / (math.sqrt(r) if config.use_rslora else r))
    if len(scalings) > 1:
        raise PeftValueError(
            f"the layers whose weights are in {experts.parameter!r} have different scalings ({sorted(scalings)}); "
            "give them the same lora_alpha / r"
        )
    growth = sum(ranks) / ranks[0]
    alpha = alphas[0] * (math.sqrt(growth) if config.use_rslora else growth)
    return sum(ranks), int(alpha) if alpha == int(alpha) else alpha


# ------------------------------------------------------------------------------------------ tensors
def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """
    Turn the tensors of a checkpoint into those of the model where transformers has renamed or fused their layers.

    Args:
        model: a model with the adapter in it.
        peft_config: the adapter's config.
        adapter_state_dict: key in a checkpoint -> tensor.
        adapter_name: name of the adapter.

    Returns:
        Key in a checkpoint of such a model -> tensor. What the model knows already, or nothing is known of, is as
        before.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    conversions = conversions_of(base)
    tensors = dict(adapter_state_dict)
    if not conversions:
        return tensors
    keys = adapter_key_map(model, adapter_name)
    prefix = prefix_of(model, base)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    for key in [key for key in tensors if key not in keys and key.startswith(prefix)]:
        renamed = key[len(prefix) :]
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        if prefix + renamed in keys and prefix + renamed not in tensors:  # else it is reported as unexpected
            tensors[prefix + renamed] = tensors.pop(key)
    saved = {place.key: key for key, place in keys.items()}
    wrappers = {
        ".".join(part for part in name.split(".") if part != "base_layer") + f".{layer.parameter_name}": name
        for name, layer in adapter_modules(model)
        if isinstance(layer, BaseTunerLayer) and layer.parameter_name is not None
    }
    for experts in find_fused_experts(base, conversions):
        wrapper = wrappers.get(prefix + experts.parameter)
        for factor, stacked in (("lora_A", _stacked_a), ("lora_B", _stacked_b)):
            target = saved.get(f"{wrapper}.{factor}.{adapter_name}.weight")
            parts = [[_first_present(tensors, prefix, names, factor) for names in layer] for layer in experts.layers]
            if target is not None and not any(None in layer for layer in parts):
                tensors[target] = stacked([torch.stack([tensors.pop(key) for key in layer]) for layer in parts])
    return tensors


def _first_present(tensors: Mapping[str, torch.Tensor], prefix: str, names: Sequence[str], factor: str) -> str | None:
    keys = (f"{prefix}{name}.{factor}.weight" for name in names)
    return next((key for key in keys if key in tensors), None)


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """
    Turn the conversions of a model's weights into those of an adapter's tensors.

    transformers calls it when its models load an adapter.

    Args:
        weight_conversions: the model's.
        adapter_name: name of the adapter.
        peft_config: the adapter's config, which says how the method's tensors are named and which experts it reaches;
            if it is left out, every method and all experts are looked for.

    Returns:
        Renamings from keys of a checkpoint to keys of the model's state dict, then conversions for layers of experts.

    Example:

        >>> from peft import LoraConfig
        >>> from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        >>> key = "base_model.model.0.lora_A.weight"
        >>> for renaming in build_peft_weight_mapping([], "default", LoraConfig()):
        ...     key, _ = renaming.rename_source_key(key)
        >>> key
        '0.lora_A.default.weight'
    """
    conversions = list(weight_conversions or ())
    prefixes = set(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    if peft_config is not None:
        prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]}
        if getattr(peft_config, "trainable_token_indices", None):
            prefixes.add(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TRAINABLE_TOKENS])
    magnitude = f"lora_magnitude_vector.{adapter_name}"
    mapping: list[Any] = [
        WeightRenaming(r"^base_model\.model\.", ""),
        *(WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}") for prefix in sorted(prefixes)),
        # the one tensor whose name in a checkpoint lacks the ending that it has in the model
        WeightRenaming(rf"{re.escape(magnitude)}$", f"{magnitude}.weight"),
        *(conversion for conversion in conversions if isinstance(conversion, WeightRenaming)),
    ]
    fusions = [fusion for fusion in conversions if _is_fusion(fusion) and _concerns(peft_config, fusion)]
    for i, fusion in enumerate(fusions):
        module = fusion.target_patterns[0].rpartition(".")[0]
        # the wrappers for several parameters of a module stand around each other
        around = sum(other.target_patterns[0].rpartition(".")[0] == module for other in fusions[i + 1 :])
        target = f"{module}{'.base_layer' * around}"
        sources = [source.removesuffix(".weight") for source in fusion.source_patterns]
        several = len(sources) > 1
        operations = {
            "lora_A": [MergeModulelist(dim=0), *([Concatenate(dim=1)] if several else []), FlattenDims((0, 1))],
            "lora_B": [
                MergeModulelist(dim=0),
                *([PeftConcatenate(dim=1)] if several else [PermuteDims((1, 2, 0)), FlattenDims((1, 2))]),
            ],
        }
        for factor, steps in operations.items():
            ending = f".{factor}.{adapter_name}.weight"
            mapping.append(fusion.copy([source + ending for source in sources], target + ending, operations=steps))
    return mapping


def _concerns(config: PeftConfig | None, fusion: WeightConverter) -> bool:
    """Whether a config reaches the layers that went into a parameter; their full names are not known here."""
    if config is None or config.peft_type != PeftType.LORA:
        return config is None
    wanted = config.target_modules or ()
    layers = [_last_part(_plain(source).removesuffix(".weight")) for source in fusion.source_patterns]
    if isinstance(wanted, str):
        return wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND or any(re.search(rf"\b{layer}\b", wanted) for layer in layers)
    return any(_last_part(entry) in layers for entry in wanted)
