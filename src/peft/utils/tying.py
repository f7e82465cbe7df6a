# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Tied weights: finding them, and keeping them tied.

Two places of a model are tied if they hold one parameter object. Nothing else makes a tie: neither names nor a flag in
a config.
"""

from dataclasses import dataclass, field

from torch import nn

from ..tuners._surgery import bare_modules, is_adapter_module


@dataclass(frozen=True)
class TiedGroup:
    """
    The places of a model that hold one parameter.

    Attributes:
        members: full names of the parameter, as they are without adapters; the owner comes first.
        parameter: the parameter itself.
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


def find_tied_groups(model: nn.Module) -> list[TiedGroup]:
    """
    Find the parameters of a base model that stand in several places.

    Parameters are compared by identity, so it works on the meta device too, and whatever they are called. A module
    object that has several names is one place: it cannot come apart.

    Args:
        model: any model, with or without adapters. What adapters brought along is passed over.

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
    places: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    for name, module in bare_modules(model):
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((prefix + key, module, parameter))
    main = _input_embedding(model)
    groups = []
    for held in places.values():
        if len(held) > 1:
            # the sort is stable: members of the same standing keep the order of the model
            held.sort(key=lambda place: 0 if place[1] is main else 1 if isinstance(place[1], nn.Embedding) else 2)
            groups.append(TiedGroup(tuple(member for member, _, _ in held), held[0][2]))
    return groups


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """Give the embedding that the model itself calls its input embedding, if it has one."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if get is None else get()
    except (NotImplementedError, AttributeError):  # models without a text input
        return None
    while embedding is not None and is_adapter_module(embedding):
        embedding = embedding._modules[embedding._base_names[0]]
    return embedding
