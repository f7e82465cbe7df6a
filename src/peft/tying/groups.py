# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Tied weights: finding them, and keeping them tied.

Two places of a model are tied if they hold one parameter: one object, or two that read one memory in the same way.
Nothing else makes a tie: neither names nor a flag in a config.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..anatomy.embeddings import input_embedding, without_adapters_around
from ..anatomy.matching import check_target_module_exists, ends_like, matching_entry, near_names, outermost
from ..anatomy.walking import bare_modules, base_modules, innermost_module
from ..checkpoints.keys import Place
from ..config import PeftConfig
from ..surgery.replication import REPLICATED_FROM
from ..utils.error import PeftError, PeftValueError
from ..utils.near_names import did_you_mean
from ..utils.same_tensor import identity_of
from ..utils.warning import warn
from .flag import computes_with_flag, configs_that_tie, forget_declared_ties


@dataclass(frozen=True)
class TiedGroup:
    """
    The places of a model that hold one parameter.

    Attributes:
        members: full names of the parameter, as they are without adapters; the owner comes first.
        parameter: the parameter itself; where members hold several objects over one memory, that of the owner.
    """

    members: tuple[str, ...]
    parameter: nn.Parameter = field(repr=False, compare=False)

    @property
    def owner(self) -> str:
        """The member that the others follow: the input embedding if it is one, else the first in the model."""
        return self.members[0]

    @property
    def followers(self) -> tuple[str, ...]:
        """The members but the owner."""
        return self.members[1:]


def module_of(member: str) -> str:
    """Give the full name of the module that holds a parameter of that full name."""
    return member.rpartition(".")[0]


def find_tied_groups(model: nn.Module, with_replicas: bool = False) -> list[TiedGroup]:
    """
    Find the parameters of a base model that stand in several places.

    Parameters are compared by identity and by memory (see `identity_of`), so it works on the meta device too, and
    whatever they are called. A module object that has several names is one place: it cannot come apart.

    Args:
        model: any model, with or without adapters. What adapters brought along is passed over.
        with_replicas: also list parameters that only replicas of one layer share (`layer_replication`). These are no
            tie: each replica is a layer of its own, with an adapter of its own.

    Returns:
        A group per parameter, in the order of the model.

    Example:

        >>> import torch
        >>> from peft.utils.tying import find_tied_groups
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> net[1].weight = net[0].weight
        >>> find_tied_groups(net)
        [TiedGroup(members=('0.weight', '1.weight'))]
    """
    held = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    counts = Counter(identity_of(parameter) for parameter in held if parameter is not None)
    if max(counts.values(), default=0) < 2:  # most models; names are only worked out for the others
        return []
    places: dict[Hashable, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    originals: dict[str, str] = {}
    for name, module in bare_modules(model):
        for place, source in enumerate(module.__dict__.get(REPLICATED_FROM, ())):
            originals[f"{name}.{place}."] = f"{name}.{source}."
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            identity = None if parameter is None else identity_of(parameter)
            if counts[identity] > 1:
                places.setdefault(identity, []).append((prefix + key, module, parameter))
    main = _input_embedding(model)
    groups = []
    for held in places.values():
        if not with_replicas and len({_of_original(member, originals) for member, _, _ in held}) == 1:
            continue
        # the sort is stable: members of the same standing keep the order of the model
        held.sort(key=lambda place: 0 if place[1] is main else 1 if isinstance(place[1], nn.Embedding) else 2)
        groups.append(TiedGroup(tuple(member for member, _, _ in held), held[0][2]))
    return groups


def _of_original(member: str, originals: Mapping[str, str]) -> str:
    """Give the name that a member of a replica has in the layer that was replicated."""
    return next((member.replace(p, original, 1) for p, original in originals.items() if member.startswith(p)), member)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """Give the embedding that the model itself calls its input embedding, if it has one."""
    return without_adapters_around(input_embedding(model))


# ------------------------------------------------------------------------------------------ record
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


def name_of_input_embedding(model: nn.Module) -> str | None:
    """Give the full name, without adapters, of what the model calls its input embedding; None if it has none."""
    embedding = _input_embedding(model)
    return next((name for name, module in bare_modules(model) if module is embedding), None)


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
        name = name_of_input_embedding(model) or next(iter(_names_matching(model, ["embed_tokens"])), None)
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


def _names_matching(model: nn.Module, entries: Collection[str]) -> list[str]:
    names = dict.fromkeys(name for name, _ in bare_modules(model))
    return [name for name in names if ends_like(entries, name)]


def containing(modules: Iterable[str], name: str) -> str | None:
    """Find the module that is, or contains, the module of that name."""
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)


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


def contains_one_of(module: str, others: Iterable[str]) -> bool:
    prefix = f"{module}." if module else ""
    return any(other != module and other.startswith(prefix) for other in others)


def _explain_not_wrappable(member: str, group: TiedGroup) -> str:
    return (
        f"ensure_weight_tying=True cannot be kept for {', '.join(map(repr, group.members))}: {member!r} stands on a "
        "module that contains other members, and cannot be replaced without replacing them; nothing was changed. Make "
        "it the parameter of a module of its own, or set ensure_weight_tying=False to train the named modules alone"
    )


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


def declared_but_untied(model: nn.Module) -> list[tuple[str, str, nn.Parameter, nn.Parameter]]:
    """
    List ties that a transformers model declares while its config asks for them, but that it does not have.

    Args:
        model: the base model, with or without adapters.

    Returns:
        Full names of owner and follower, and the parameters that stand there.
    """
    declared = getattr(model, "all_tied_weights_keys", None)
    asked = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not isinstance(declared, Mapping) or not asked:
        return []
    parameters = {
        f"{name}.{key}": parameter
        for name, module in bare_modules(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    pairs = [
        (owner, follower, parameters.get(owner), parameters.get(follower)) for follower, owner in declared.items()
    ]
    return [pair for pair in pairs if None not in pair[2:] and identity_of(pair[2]) != identity_of(pair[3])]


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
    groups = find_tied_groups(model)
    reached = find_reached_ties(model, config, groups)
    kept = [tie for tie in reached if config.ensure_weight_tying or unasked(tie)]
    lost = [tie for tie in reached if tie not in kept and tie.comes_apart]
    if lost:
        warn(describe_loss(config, lost))
    if config.ensure_weight_tying and not reached:
        warn(describe_no_effect(model, groups))
    refuse_two_routes(kept)
    return kept


@contextmanager
def one_object_each(model: nn.Module) -> Iterator[None]:
    """
    Let the members of each tied group hold one parameter object, the owner's, from now on.

    Objects that only share their memory would part when the model is moved, cast or copied. If the context ends with
    an exception, each member gets back what it held.

    Args:
        model: the base model.
    """
    groups = find_tied_groups(model, with_replicas=True)
    shared = {identity_of(group.parameter): group.parameter for group in groups}
    replaced = []
    for module in base_modules(model) if shared else ():
        for key, parameter in module._parameters.items():
            one = None if parameter is None else shared.get(identity_of(parameter), parameter)
            if one is not parameter:
                replaced.append((module._parameters, key, parameter))
                module._parameters[key] = one
    try:
        yield
    except BaseException:
        for held, key, parameter in replaced:
            held[key] = parameter
        raise


# ------------------------------------------------------------------------------------------ merge, save, load
def settle_ties(model: nn.Module, groups: Iterable[TiedGroup], kept: Collection[str]) -> None:
    """
    Bring the ties of a base model in order after adapters were merged into it.

    Where an adapter has put a trained parameter in the place of some members, the rest of the group gets it too, if
    its tie is to be kept. Otherwise the group has come apart on purpose: the model's config is told so, since a reader
    of the saved model would tie the members again and lose what was trained.

    Args:
        model: the base model, without adapters.
        groups: its tied groups, as they were before.
        kept: full names of modules whose ties the merged adapters were to keep.
    """
    apart = []
    for group in groups:
        present = [_parameter(model, member) for member in group.members]
        trained = {identity_of(p): p for p in present}
        if len(trained) == 1:
            continue
        trained.pop(identity_of(group.parameter), None)
        if len(trained) == 1 and any(containing(kept, module_of(member)) for member in group.members):
            (parameter,) = trained.values()
            for member in group.members:
                _set_parameter(model, member, parameter)
        else:
            apart.append(group)
    if apart:
        _declare_untied(model, apart)


def _parameter(model: nn.Module, member: str) -> nn.Parameter:
    path, _, key = member.rpartition(".")
    return innermost_module(model, path)._parameters[key]


def _set_parameter(model: nn.Module, member: str, parameter: nn.Parameter) -> None:
    path, _, key = member.rpartition(".")
    innermost_module(model, path)._parameters[key] = parameter


def _declare_untied(model: nn.Module, apart: Iterable[TiedGroup]) -> None:
    """Make a model whose members were adapted apart survive saving and loading with transformers."""
    configs = [config for module in model.modules() for config in configs_that_tie(module)]
    flag = ""
    if configs and computes_with_flag(model):
        forgotten = forget_declared_ties(model)
        _give_own_tensors(model, lambda member: member in forgotten)
        flag = (
            "; tie_word_embeddings stays True in its config, since the model computes something else without it, and "
            "transformers 5 or newer, which keeps members apart that differ, is needed to read it from files"
        )
    elif configs:
        for config in configs:
            config.tie_word_embeddings = False
        _give_own_tensors(model, lambda member: True)  # the flag stands for all ties at once
        flag = "; tie_word_embeddings is False in its config now, so that saving and loading keeps them apart"
    members = "; ".join(", ".join(repr(member) for member in group.members) for group in apart)
    warn(
        f"modules that shared a weight were adapted apart and are no longer tied in the merged model ({members}){flag}"
    )


def _give_own_tensors(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """
    Part members that are still tied, but that transformers would not tie when it reads the model.

    Tensors that are shared are saved under one name only, so the others would be missing in the file.
    """
    for group in find_tied_groups(model):
        for member in filter(wanted, group.followers):
            _set_parameter(model, member, nn.Parameter(group.parameter.detach().clone(), requires_grad=False))


def split_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Place]]:
    """
    Keep each tensor of a checkpoint once.

    Args:
        tensors: key -> tensor, the keys of owners before those of followers. Tensors are the same if they are the same
            memory, read forwards or transposed.

    Returns:
        The tensors to write, and a table alias -> place of its tensor among them.
    """
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, Place] = {}
    first: dict[Hashable, str] = {}
    for key, tensor in tensors.items():
        owner = first.get(identity_of(tensor))
        transposed_owner = first.get(identity_of(tensor.T)) if tensor.dim() == 2 else None
        if owner is None and transposed_owner is None:
            kept[key] = tensor
            first[identity_of(tensor)] = key
        else:
            aliases[key] = Place(transposed_owner, True) if owner is None else Place(owner)
    return kept, aliases


ALIASES_HEADER = "tied_aliases"


_BAD_ALIASES = (
    "the table of tied tensors in the file's header does not fit its content ({}); the file was changed after it was "
    "saved: save the adapter again"
)


def aliases_to_header(aliases: Mapping[str, Place]) -> dict[str, str]:
    """Write a table of aliases as an entry of a safetensors header; nothing for an empty table."""
    return {ALIASES_HEADER: json.dumps(aliases, sort_keys=True)} if aliases else {}


def restore_aliases(tensors: dict[str, torch.Tensor], header: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """
    Give tensors that were written once all their keys again.

    Args:
        tensors: content of a safetensors file.
        header: its metadata.

    Raises:
        PeftValueError: if the table names a key that the file lacks.
    """
    places = aliases_from_header(header)
    absent = [place.key for place in places.values() if place.key not in tensors]
    if absent:
        raise PeftValueError(_BAD_ALIASES.format(f"there is no {absent[0]!r}"))
    twice = [alias for alias in places if alias in tensors]
    if twice:
        raise PeftValueError(_BAD_ALIASES.format(f"{twice[0]!r} is a tensor of its own"))
    return {**tensors, **{alias: place.read(tensors[place.key]) for alias, place in places.items()}}


def aliases_from_header(header: Mapping[str, str] | None) -> dict[str, Place]:
    """
    Read the table of aliases from the metadata of a safetensors file.

    Args:
        header: the metadata.

    Returns:
        Key that is not in the file -> the key, and the layout, that it stands for.

    Raises:
        PeftValueError: if it is no such table.
    """
    try:
        aliases = json.loads((header or {}).get(ALIASES_HEADER, "{}"))
        return {alias: Place(str(key), bool(transposed)) for alias, (key, transposed) in aliases.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise PeftValueError(_BAD_ALIASES.format(repr(error))) from error


def __getattr__(name: str) -> Any:
    """Resolve the names of the report, which lives in a module that builds on this one."""
    if name in ("TyingReport", "TyingRow", "plan_weight_tying", "weight_tying_report"):
        from ..tying import report as tying_report

        return getattr(tying_report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
