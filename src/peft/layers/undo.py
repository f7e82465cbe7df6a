# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What a change of a model says about itself, so that it can be taken back.

Whoever writes to a tensor that was there before says so to `keep_values`, and whoever changes an object that no module
of the model holds gives `on_failure` the way back. Who takes changes back, if anybody, opens `undoing` around them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn


class Undoing(Protocol):
    """Whoever takes changes back."""

    def note(self, roots: Iterable[nn.Module]) -> None:
        """Note what models are before they are changed, as far as that is not noted yet."""

    def has_noted(self, is_wanted: Callable[[nn.Module], bool]) -> bool:
        """Say whether one of the modules that were noted is wanted."""

    def keep_values(self, tensor: torch.Tensor) -> None:
        """Copy a tensor, if it was there before."""

    def on_failure(self, way_back: Callable[[], Any]) -> None:
        """Note what has to be called to undo something."""


_OPEN: ContextVar[Undoing | None] = ContextVar("undoing_changes", default=None)


def who_undoes() -> Undoing | None:
    """Give who takes changes back that are made now; None if nobody does."""
    return _OPEN.get()


@contextmanager
def undoing(changes: Undoing) -> Iterator[None]:
    """
    Say who takes changes back that are made inside.

    Args:
        changes: is told of them.
    """
    token = _OPEN.set(changes)
    try:
        yield
    finally:
        _OPEN.reset(token)


def keep_values(tensors: Iterable[torch.Tensor]) -> None:
    """
    Keep the values of tensors that are about to be written to, should that have to be undone.

    Only what was there when the changes began is copied. Where nobody undoes them nothing is done.

    Args:
        tensors: parameters and buffers.
    """
    changes = _OPEN.get()
    if changes is not None:
        for tensor in tensors:
            changes.keep_values(tensor)


def on_failure(way_back: Callable[[], Any]) -> None:
    """
    Say how to undo a change of something that no module of the model holds.

    Args:
        way_back: is called if the changes are taken back; the last one first.
    """
    changes = _OPEN.get()
    if changes is not None:
        changes.on_failure(way_back)
