# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Settling ties: members hold one object while adapters are there, and are kept tied or untied after merging."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..anatomy.matching import containing
from ..anatomy.walking import base_modules, innermost_module
from ..utils.same_tensor import identity_of
from ..utils.warning import warn
from .flag import computes_with_flag, configs_that_tie, forget_declared_ties, ties_without_flag
from .groups import TiedGroup, declared_but_untied, find_tied_groups, module_of


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
    elif kept and ties_without_flag(model):
        model.config.tie_word_embeddings = True
        warn(
            "the merged embedding and head are one tensor, as the adapter was to keep them, but the config of the "
            "model said tie_word_embeddings=False, with which a reader of the saved model would find only one of "
            "them; it is True in its config now"
        )


def settle_declared(model: nn.Module, changed: Collection[int]) -> None:
    """
    Let a model no longer declare ties that it did not have, once an adapter is merged into one of the members.

    A checkpoint that holds members with different values is read like that. A reader of the merged model would tie
    them again and lose what was trained.

    Args:
        model: the base model, without adapters.
        changed: ids of the modules that were adapted.
    """
    apart = [
        TiedGroup((owner, follower), parameter)
        for owner, follower, parameter, _ in declared_but_untied(model)
        if any(id(innermost_module(model, module_of(member))) in changed for member in (owner, follower))
    ]
    if apart:
        _declare_untied(model, apart, "modules that the model declares to be tied hold tensors of their own, and")


def _parameter(model: nn.Module, member: str) -> nn.Parameter:
    path, _, key = member.rpartition(".")
    return innermost_module(model, path)._parameters[key]


def _set_parameter(model: nn.Module, member: str, parameter: nn.Parameter) -> None:
    path, _, key = member.rpartition(".")
    innermost_module(model, path)._parameters[key] = parameter


def _declare_untied(model: nn.Module, apart: Iterable[TiedGroup], what: str = "modules that shared a weight") -> None:
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
    warn(f"{what} were adapted apart and are no longer tied in the merged model ({members}){flag}")


def _give_own_tensors(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """
    Part members that are still tied, but that transformers would not tie when it reads the model.

    Tensors that are shared are saved under one name only, so the others would be missing in the file.
    """
    for group in find_tied_groups(model):
        for member in filter(wanted, group.followers):
            _set_parameter(model, member, nn.Parameter(group.parameter.detach().clone(), requires_grad=False))
