# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Parameters that a module holds although they are another module's."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..utils.same_tensor import identity_of
from .new_tensors import copy_module


class Borrowed(NamedTuple):
    """A parameter of one module that is in fact another module's: module and name of the first, then of the second."""

    module: nn.Module
    name: str
    lender: nn.Module
    lender_name: str

    def take(self) -> None:
        """Hold the lender's parameter."""
        self.module._parameters[self.name] = self.lender._parameters[self.lender_name]


def shared_places(module: nn.Module, other: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Find the parameters that a module shares with another one: own name -> that one, and the name there."""
    theirs = {identity_of(p): name for name, p in other.named_parameters(remove_duplicate=False)}
    own = module.named_parameters(remove_duplicate=False)
    return {name: (other, theirs[key]) for name, p in own if (key := identity_of(p)) in theirs}


def copy_borrowing(module: nn.Module, lent: Mapping[str, tuple[nn.Module, str]]) -> tuple[nn.Module, list[Borrowed]]:
    """
    Copy a module around parameters of others, which are never copied, not even for a moment.

    Args:
        module: what to copy.
        lent: name of a parameter -> module whose parameter stands there in the copy, and its name in that one.

    Returns:
        The copy, and what it has borrowed.
    """
    instead = {id(module.get_parameter(name)): lender.get_parameter(there) for name, (lender, there) in lent.items()}
    copied = copy_module(module, instead)
    return copied, [Borrowed(*_place(copied, name), *_place(*place)) for name, place in lent.items()]


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key
