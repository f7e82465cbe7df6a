# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapters of tied modules on models that lack some of the members.

A model without a head has the embedding of the one that an adapter was trained on, but nothing that is tied to it. If
the adapter's config names the head alone, its part for the embedding is in the file, and nothing asks for it.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from ..anatomy.matching import check_target_module_exists, ends_like, lies_in, matching_entry
from ..anatomy.walking import bare_modules
from ..config import PeftConfig
from ..tying.groups import find_tied_groups, module_of


_BASE = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"


def config_for_members(
    config: PeftConfig, model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str
) -> PeftConfig:
    """
    Let a config also name members of a tie that a checkpoint has tensors for, where those that it names are absent.

    Args:
        config: config of an adapter that is to be loaded; it is not changed.
        model: the base model, with or without other adapters.
        tensors: the adapter's tensors, by their keys in the checkpoint.
        prefix: what the names of the method's tensors start with.

    Returns:
        The config itself if there is nothing to add, else a copy.
    """
    if not config.ensure_weight_tying or config.is_prompt_learning:
        return config
    present = {name for name, _ in bare_modules(model) if name}
    tied = {module_of(member) for group in find_tied_groups(model) for member in group.members}
    keys = {key.removeprefix(_BASE): tensor for key, tensor in tensors.items()}
    changed = copy.copy(config)
    _add_targets(changed, {key.partition(f".{prefix}")[0] for key in keys if f".{prefix}" in key}, present, tied)
    _add_saved(changed, keys, present, tied)
    _add_tokens(changed, keys, present)
    return config if vars(changed) == vars(config) else changed


def name_tied_targets(config: PeftConfig, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> PeftConfig:
    """
    Let a config target every member of a tie that a checkpoint has tensors for.

    Readers that know of no ties look for tensors of those modules only that the config names.

    Args:
        config: config of an adapter of the model; it is not changed.
        model: the base model.
        tensors: the adapter's tensors, by their keys in the checkpoint.

    Returns:
        The config itself if there is nothing to add, else a copy.
    """
    keys = [key.removeprefix(_BASE) for key in tensors]
    ties = (config.ensure_weight_tying and config.target_modules_to_tie) or {}
    more = [
        name
        for name in dict.fromkeys([*ties.values(), *ties])
        if not check_target_module_exists(config, name) and any(key.startswith(f"{name}.") for key in keys)
    ]
    if not more:
        return config
    changed = copy.copy(config)
    names = [name for name, _ in bare_modules(model)]
    _target_too(changed, [_shortest(name, names) for name in more])
    return changed


def _shortest(name: str, names: Iterable[str]) -> str:
    """Give the last part of a name, which readers compare, unless other modules have it too."""
    last = name.rpartition(".")[2]
    return last if all(other == name or not ends_like([last], other) for other in names) else name


def _add_targets(config: PeftConfig, adapted: Iterable[str], present: set[str], tied: set[str]) -> None:
    """Target modules that the checkpoint adapts, if it adapts a target which the model lacks."""
    wanted, adapted = getattr(config, "target_modules", None), set(adapted)
    if not wanted or not any(check_target_module_exists(config, name) for name in adapted - present):
        return
    more = {name for name in (adapted & present) - tied if not check_target_module_exists(config, name)}
    if more:
        _target_too(config, sorted(more))


def _target_too(config: PeftConfig, more: Collection[str]) -> None:
    """Target further modules, by the ends of their names, in the form in which the config has its targets."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        names = "|".join(r"(?:.*\.)?" + name.replace(".", r"\.") for name in more)
        config.target_modules = f"(?:{wanted})|{names}"
    else:
        config.target_modules = type(wanted)([*wanted, *more])


def _add_saved(config: PeftConfig, keys: Mapping[str, torch.Tensor], present: set[str], tied: set[str]) -> None:
    """Save modules for which the checkpoint has the very values of a saved module which the model lacks."""
    wanted = getattr(config, "modules_to_save", None)
    if not wanted:
        return
    by_shape: dict[torch.Size, list[str]] = defaultdict(list)
    for key, tensor in keys.items():
        if module_of(key) in present - tied and not lies_in(wanted, module_of(key)):
            by_shape[tensor.shape].append(key)
    more = {
        module_of(other): None
        for key, tensor in keys.items()
        if module_of(key) not in present and lies_in(wanted, module_of(key))
        for other in by_shape[tensor.shape]
        if torch.equal(keys[other], tensor)
    }
    if more:
        config.modules_to_save = [*wanted, *more]


def _add_tokens(config: PeftConfig, keys: Mapping[str, torch.Tensor], present: set[str]) -> None:
    """Train the tokens of modules that the checkpoint has rows for, in the place of one which the model lacks."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not isinstance(wanted, Mapping):
        return
    absent = {entry for entry in wanted if all(matching_entry({entry}, name) is None for name in present)}
    kept = {entry: indices for entry, indices in wanted.items() if entry not in absent}
    rows = [key.removesuffix(_TOKENS) for key in keys if key.endswith(_TOKENS)]
    others = [name for name in rows if name in present and matching_entry(kept, name) is None]
    if len(absent) == 1 and others:
        (entry,) = absent
        config.trainable_token_indices = {**kept, **dict.fromkeys(others, wanted[entry])}
