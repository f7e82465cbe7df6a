# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Configs that name linear layers of experts, for models that have parameters in their places."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from safetensors import safe_open
from torch import nn

from ...anatomy.matching import dotted_endings, find_targets, pattern_lookup, shortest_endings
from ...anatomy.walking import bare_modules
from ...config import PeftConfig
from ...registry import PeftType
from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME
from ...utils.error import PeftValueError
from ...utils.warning import warn
from .experts import FusedExperts, find_fused_experts, last_part


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
    of_modules = {last_part(name) for name in find_targets(wanted, modules).names}
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
        names = sorted({last_part(name) for name in left})
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
        config.target_modules = _remaining_targets(config, modules, chosen, routers)
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
    config: PeftConfig, modules: Sequence[str], chosen: Sequence[FusedExperts], routers: Sequence[str]
) -> set[str]:
    """Leave out of `target_modules` what names layers only that modules no longer are; an expression becomes names."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        return shortest_endings(find_targets(config, modules).names, [*modules, *routers])
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
                f"rank_pattern or alpha_pattern tells experts apart whose {last_part(of_expert[0][0])!r} are in one "
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
