# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Finding ties.

Two places of a model are tied if they hold one parameter: one object, or two that read one memory in the same way.
Nothing else makes a tie: neither names nor a flag in a config.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..anatomy.embeddings import input_embedding, without_adapters_around
from ..anatomy.replicas import origins_in
from ..anatomy.walking import bare_modules, base_modules
from ..utils.same_tensor import identity_of


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
        >>> from peft.tying.groups import find_tied_groups
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
        originals.update(origins_in(name, module))
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


def name_of_input_embedding(model: nn.Module) -> str | None:
    """Give the full name, without adapters, of what the model calls its input embedding; None if it has none."""
    embedding = _input_embedding(model)
    return next((name for name, module in bare_modules(model) if module is embedding), None)


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
