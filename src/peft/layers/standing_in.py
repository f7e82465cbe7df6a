# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that stand in a module in the place of its own while it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.stateless import _reparametrize_module


@contextmanager
def standing_in(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """
    Let a module read other tensors than its own inside a context.

    While FSDP computes, plain attributes stand before the parameters of the same name, and would be read in the place
    of what replaces those. A parametrised weight is computed whenever it is read. What is a mere parameter is left to
    torch.

    Args:
        module: a module.
        tensors: full name in the module -> tensor. Another name of the same parameter is another place.
    """
    left, replaced = {}, []
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        holder = module.get_submodule(path)
        if key in holder.__dict__:
            replaced.append((holder.__dict__, key, holder.__dict__[key]))
            holder.__dict__[key] = tensor
        elif parametrize.is_parametrized(holder, key):
            lists = holder.parametrizations._modules
            replaced.append((lists, key, lists[key]))
            lists[key] = _Given(tensor)
        else:
            left[name] = tensor
    try:
        with _reparametrize_module(module, left, tie_weights=False):
            yield
    finally:
        for place, key, before in replaced:
            place[key] = before


class _Given(nn.Module):
    """Gives a tensor where a parametrisation would compute it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["tensor"] = tensor

    def forward(self) -> torch.Tensor:
        return self.tensor
