# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Recording ties, before anything is changed: which of them a config reaches, who has to follow whom, what is refused.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..anatomy.matching import (
    check_target_module_exists,
    containing,
    contains_one_of,
    ends_like,
    lies_in,
    matching_entry,
    near_names,
    outermost,
)
from ..anatomy.walking import bare_modules
from ..config import PeftConfig
from ..utils.error import PeftError, PeftValueError
from ..utils.near_names import did_you_mean
from ..utils.warning import warn
from .groups import TiedGroup, declared_but_untied, find_tied_groups, module_of, name_of_input_embedding


@dataclass(frozen=True)
class ReachedTie:
    """
    A tied group of which a config reaches at least one member.

    Attributes:
        group: the group.
        saved: members that lie in a module of `modules_to_save` -> full name of that module.
        targeted: members whose module is a target.
        tokens: members of which single tokens are trained -> the tokens.
        parameters: members that are targets themselves, whatever their modules are.
    """

    group: TiedGroup
    saved: dict[str, str] = field(hash=False)
    targeted: tuple[str, ...] = ()
    tokens: dict[str, frozenset[int]] = field(default_factory=dict, hash=False)
    parameters: tuple[str, ...] = ()

    @property
    def comes_apart(self) -> bool:
        """Whether the members would no longer be one if nothing were done about it."""
        in_one_copy = len(self.saved) == len(self.group.members) and len(set(self.saved.values())) == 1
        return bool(self.targeted or self.tokens or self.parameters) or not in_one_copy

    @property
    def routes(self) -> dict[str, Collection[str]]:
        """The routes by which members are reached -> these members."""
        routes = {
            "modules_to_save": self.saved,
            "target_modules": self.targeted,
            "trainable_token_indices": self.tokens,
            "target_parameters": self.parameters,
        }
        return {route: members for route, members in routes.items() if members}

    @property
    def trains_the_same_tokens(self) -> bool:
        """Whether the owner's tokens are trained, and nothing else is asked for any member."""
        return self.group.owner in self.tokens and len(self.routes) == 1 and len(set(self.tokens.values())) == 1


def keep_ties(
    model: nn.Module, config: PeftConfig, unasked: Callable[[ReachedTie], bool] = lambda tie: False
) -> list[ReachedTie]:
    """
    Sort the ties that a config reaches into those that are kept and those that are lost, of which it warns.

    Args:
        model: the model, not changed yet by this config.
        config: a config whose targets are resolved.
        unasked: says whether a tie is kept although the config does not ask for it.

    Returns:
        The ties that are kept.

    Raises:
        PeftValueError: if one cannot be kept.
    """
    leave_out_saved_tokens(model, config)
    groups = find_tied_groups(model)
    reached = find_reached_ties(model, config, groups)
    kept = [tie for tie in reached if config.ensure_weight_tying or unasked(tie)]
    lost = [tie for tie in reached if tie not in kept and tie.comes_apart]
    if lost:
        warn(describe_loss(config, lost))
    if config.ensure_weight_tying and not reached:
        warn(describe_no_effect(model, groups))
    kept = prefer_whole_matrices(model, config, kept)
    refuse_two_routes(kept)
    return kept


def leave_out_saved_tokens(model: nn.Module, config: PeftConfig) -> None:
    """
    Train an input embedding in full whose tokens are to be trained, if the config does not name it for the tokens.

    The tokens are part of it. They are taken out of the config, with one warning. A config that names a module in both
    entries contradicts itself, and is refused elsewhere.

    Args:
        model: the model.
        config: a config whose targets are resolved.
    """
    tokens, saved = getattr(config, "trainable_token_indices", None), getattr(config, "modules_to_save", None)
    name = default_token_module(model) if tokens and saved and not isinstance(tokens, Mapping) else None
    if name is not None and lies_in(saved, name):
        config.trainable_token_indices = None
        warn(
            f"trainable_token_indices has no effect: its tokens are those of {name!r}, which modules_to_save trains "
            "in full, and they with it. Leave one of the two entries out"
        )


def prefer_whole_matrices(model: nn.Module, config: PeftConfig, reached: list[ReachedTie]) -> list[ReachedTie]:
    """
    Train a tied matrix in full of which one member is to be saved and another one's tokens are to be trained.

    The tokens are part of it. They are taken out of the config, with one warning.

    Args:
        model: the model.
        config: a config whose targets are resolved.
        reached: ties that are to be kept.

    Returns:
        The ties, of which none has both.
    """
    whole = [tie for tie in reached if tie.saved and tie.tokens]
    if not whole:
        return reached
    inside = dict.fromkeys(module_of(member) for tie in whole for member in tie.tokens)
    saved = dict.fromkeys(name for tie in whole for name in tie.saved.values())
    warn(
        f"trainable_token_indices names tokens of {', '.join(map(repr, inside))}, which ensure_weight_tying keeps "
        f"tied to {', '.join(map(repr, saved))} of modules_to_save: the whole matrix is trained, with these tokens. "
        "Leave one of the two entries out to have it otherwise"
    )
    tokens = find_token_modules(model, config.trainable_token_indices)
    config.trainable_token_indices = {name: ids for name, ids in tokens.items() if name not in inside} or None
    return [replace(tie, tokens={}) if tie in whole else tie for tie in reached]


def find_reached_ties(model: nn.Module, config: PeftConfig, groups: Iterable[TiedGroup]) -> list[ReachedTie]:
    """
    Find the tied groups that a config reaches, by any route.

    Args:
        model: the model, not changed yet by this config.
        config: a config whose targets are resolved.
        groups: the model's tied groups.
    """
    saved_modules = outermost(_names_matching(model, getattr(config, "modules_to_save", None) or ()))
    token_modules = find_token_modules(model, getattr(config, "trainable_token_indices", None))
    reached = []
    for group in groups:
        saved = {m: name for m in group.members if (name := containing(saved_modules, module_of(m))) is not None}
        targeted = tuple(
            member
            for member in group.members
            if member not in saved
            and member.endswith("weight")
            and getattr(config, "target_modules", None) is not None
            and check_target_module_exists(config, module_of(member))
        )
        tokens = {
            member: frozenset(token_modules[module_of(member)])
            for member in group.members
            if member not in saved and member.endswith("weight") and module_of(member) in token_modules
        }
        wanted = set(getattr(config, "target_parameters", None) or ())
        parameters = tuple(m for m in group.members if m not in saved and matching_entry(wanted, m) is not None)
        if saved or targeted or tokens or parameters:
            reached.append(ReachedTie(group, saved, targeted, tokens, parameters))
    return reached


def find_token_modules(model: nn.Module, tokens: Collection[int] | Mapping[str, Collection[int]] | None) -> dict:
    """
    Find the modules of which single tokens are trained.

    Args:
        model: the model.
        tokens: ids for the input embedding, or name of a module (or its ending, see `ends_like`) -> ids. Where several
            names fit a module, the first counts.

    Returns:
        Full name -> ids.

    Raises:
        PeftValueError: if a name matches nothing, or the model does not say which its input embedding is.
    """
    if not tokens:
        return {}
    if not isinstance(tokens, Mapping):
        name = default_token_module(model)
        if name is None:
            raise PeftValueError(
                "trainable_token_indices is a list, and the model does not say which layer its input embedding is; "
                "give a dictionary from the layer's name to the indices"
            )
        return {name: list(tokens)}
    modules = {}
    for entry, indices in tokens.items():
        names = _names_matching(model, [entry])
        if not names:
            near = near_names(entry, [name for name, _ in bare_modules(model) if name])
            raise PeftValueError(
                f"trainable_token_indices names {entry!r}, which the model does not have{did_you_mean(near)}"
            )
        for name in names:
            modules.setdefault(name, list(indices))
    return modules


def default_token_module(model: nn.Module) -> str | None:
    """Give the full name of the module whose tokens are trained where none is named; None if there is no such one."""
    return name_of_input_embedding(model) or next(iter(_names_matching(model, ["embed_tokens"])), None)


def _names_matching(model: nn.Module, entries: Collection[str]) -> list[str]:
    names = dict.fromkeys(name for name, _ in bare_modules(model))
    return [name for name in names if ends_like(entries, name)]


def find_followers(
    reached: Iterable[ReachedTie], can_own: Callable[[str], bool] = lambda module: True
) -> dict[str, str]:
    """
    Work out which modules have to follow which, so that tied groups stay tied.

    The module that holds a group's owner is adapted, whether it was named or another member was; every other module
    that holds a member follows it.

    Args:
        reached: tied groups that a config reaches, all by the same route.
        can_own: says whether a module of that full name can have the adapter; the first that can is followed.

    Returns:
        Full name of a module -> full name of the module that it follows, which is never a follower itself.

    Raises:
        PeftValueError: if a module cannot follow. Nothing has been changed then.
    """
    ties: dict[str, str] = {}
    for tie in reached:
        owner, *followers = sorted(_wrappable_modules(tie), key=lambda module: not can_own(module))
        for module in followers:
            if ties.setdefault(module, owner) != owner or module in ties.values() or owner in ties:
                raise PeftValueError(
                    f"{module!r} shares parameters with {ties[module]!r} and with {owner!r} and cannot follow both; "
                    "list modules in modules_to_save that lie inside these"
                )
    return ties


def find_following_parameters(reached: Iterable[ReachedTie]) -> dict[str, str]:
    """
    Work out which parameters have to follow which, where parameters themselves are targets.

    Args:
        reached: tied groups that a config reaches.

    Returns:
        Full name of a parameter -> full name of the one that it follows.

    Raises:
        PeftValueError: for a parameter of the model itself, which nothing can be put around.
    """
    groups = [tie.group for tie in reached if tie.parameters]
    for group in groups:
        if "" in map(module_of, group.members):
            raise PeftValueError(_explain_not_wrappable(group.members[-1], group))
    return {member: group.owner for group in groups for member in group.followers}


def _wrappable_modules(tie: ReachedTie) -> list[str]:
    """
    Find the modules to replace so that every member of a group is trained, the one with the owner first.

    A parameter may stand on a module that contains other members and so cannot be replaced. If it is a bias (BERT's
    head has one for the sake of its name), it takes part in no computation and gets the trained value when the adapter
    is merged. A matrix is refused.
    """
    group = tie.group
    modules = {member: tie.saved.get(member, module_of(member)) for member in group.members}
    containers = [member for member, module in modules.items() if contains_one_of(module, modules.values())]
    if containers and group.parameter.dim() >= 2:
        raise PeftValueError(_explain_not_wrappable(containers[0], group))
    return list(dict.fromkeys(module for member, module in modules.items() if member not in containers))


def _explain_not_wrappable(member: str, group: TiedGroup) -> str:
    return (
        f"ensure_weight_tying=True cannot be kept for {', '.join(map(repr, group.members))}: {member!r} stands on a "
        "module that contains other members, and cannot be replaced without replacing them; nothing was changed. Make "
        "it the parameter of a module of its own, or set ensure_weight_tying=False to train the named modules alone"
    )


def refuse_two_routes(reached: Iterable[ReachedTie]) -> None:
    """
    Refuse groups whose members are to be adapted in different ways, or with different tokens.

    Raises:
        PeftValueError: if there is one. Nothing has been changed then.
    """
    for tie in reached:
        members = ", ".join(map(repr, tie.group.members))
        if len(tie.routes) > 1:
            found = ", and ".join(f"{route} reaches {', '.join(map(repr, m))}" for route, m in tie.routes.items())
            raise PeftValueError(
                f"ensure_weight_tying=True cannot be kept for {members}: {found}, but one weight can only be adapted "
                "in one way; take one of the two out"
            )
        if len(set(tie.tokens.values())) > 1:
            found = ", ".join(f"{member!r}: {sorted(indices)}" for member, indices in tie.tokens.items())
            raise PeftValueError(
                f"ensure_weight_tying=True cannot be kept for {members}, whose tokens differ ({found}); give all of "
                "them the same indices, or set ensure_weight_tying=False to train them apart"
            )


def refuse_excluded(config: PeftConfig, ties: Iterable[ReachedTie]) -> None:
    """
    Refuse ties that would bring in a module which `exclude_modules` leaves out.

    Args:
        config: a config whose targets are resolved.
        ties: tied groups that are to be adapted as targets.

    Raises:
        PeftValueError: if there is one. Nothing has been changed then.
    """
    excluded = getattr(config, "exclude_modules", None)
    for tie in ties:
        modules = list(map(module_of, tie.group.members))
        left_out = [name for name in modules if matching_entry(excluded, name) is not None]
        if left_out:
            apart = ", or set ensure_weight_tying=False to adapt them apart" if config.ensure_weight_tying else ""
            raise PeftValueError(
                f"exclude_modules leaves out {', '.join(map(repr, left_out))}, and target_modules reaches "
                f"{', '.join(repr(module_of(member)) for member in tie.targeted)}, which shares its weight with it; a "
                f"tie is kept by adapting all of its members. Leave one of the two entries out{apart}"
            )


@contextmanager
def explaining_tie(name: str, ties: Mapping[str, str], config: PeftConfig) -> Iterator[None]:
    """
    Say, if a module is refused inside, that a tie has brought it in, unless the config targets it.

    Args:
        name: full name of the module.
        ties: follower -> module that it follows.
        config: a config whose targets are resolved.
    """
    try:
        yield
    except PeftError as error:
        others = [other for pair in ties.items() if name in pair for other in pair if other != name]
        if not others or check_target_module_exists(config, name):
            raise
        raise type(error)(
            f"{error}. {name!r} is not named in target_modules: it shares its weight with "
            f"{', '.join(map(repr, others))}, and is adapted to keep the tie"
        ) from error


def describe_loss(config: PeftConfig, ties: Iterable[ReachedTie]) -> str:
    """
    Say what becomes of tied groups that a config reaches without keeping them tied.

    Args:
        config: the config.
        ties: groups that come apart.
    """
    parts = []
    for tie in ties:
        modules = map(module_of, [*tie.targeted, *tie.tokens])
        named = ", ".join(map(repr, dict.fromkeys([*tie.saved.values(), *modules, *tie.parameters])))
        members = ", ".join(repr(member) for member in tie.group.members)
        parts.append(f"{named} (tied: {members})")
    ways = "set ensure_weight_tying=True to train them as one, or name none of these modules, so that all stay frozen"
    return (
        f"the config reaches modules that share a weight with others: {'; '.join(parts)}. Each is adapted by itself, "
        f"so they are no longer tied after training. To keep them tied, {ways}"
    )


def describe_no_effect(model: nn.Module, groups: Iterable[TiedGroup]) -> str:
    """
    Say why `ensure_weight_tying=True` has nothing to do.

    Args:
        model: the base model.
        groups: its tied groups, none of which the config reaches.
    """
    groups = list(groups)
    if groups:
        members = "; ".join(", ".join(repr(member) for member in group.members) for group in groups)
        return f"ensure_weight_tying=True has no effect: the config reaches none of the tied weights ({members})"
    absent = "; ".join(
        f"{owner!r} ({_describe(one)}) and {follower!r} ({_describe(other)})"
        for owner, follower, one, other in declared_but_untied(model)
    )
    if absent:
        return (
            f"ensure_weight_tying=True has no effect: the model declares ties, but holds tensors of their own there: "
            f"{absent}. Bring them to one device, type and shape and call model.tie_weights() before adapting it"
        )
    flag = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    says = "" if flag is None else f" (its config says tie_word_embeddings={flag})"
    return f"ensure_weight_tying=True has no effect: no two modules of the model share a parameter{says}"


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, on {tensor.device}"
