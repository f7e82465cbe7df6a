# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Changes say how they can be taken back to whoever does that, and to nobody else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from peft.layers.undo import keep_values, on_failure, undoing, who_undoes


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def note(self, roots: Iterable[nn.Module]) -> None:
        self.told.extend(roots)

    def keep_values(self, tensor: torch.Tensor) -> None:
        self.told.append(tensor)

    def on_failure(self, way_back: Callable[[], Any]) -> None:
        self.told.append(way_back)


def test_told_inside_only() -> None:
    notes, tensors = Notes(), [torch.zeros(1), torch.zeros(2)]
    keep_values(tensors)
    on_failure(print)
    with undoing(notes):
        assert who_undoes() is notes
        keep_values(tensors)
        on_failure(print)
    keep_values(tensors)
    assert who_undoes() is None
    assert len(notes.told) == 3 and notes.told[0] is tensors[0] and notes.told[2] is print


def test_the_innermost_is_told() -> None:
    outer, inner = Notes(), Notes()
    with undoing(outer):
        with undoing(inner):
            on_failure(print)
        on_failure(repr)
    assert inner.told == [print] and outer.told == [repr]
