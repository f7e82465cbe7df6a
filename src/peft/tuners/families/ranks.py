# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Factors of which fewer ranks are saved than there are: there is room for more, or some have been taken away."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RankAxis:
    """
    Where a factor has its ranks.

    Attributes:
        axis: dimension: 0 for the factor that meets the input, 1 for the one that gives the output.
        groups: groups of channels that share the ranks out among them.
        experts: matrices in one factor, each of which has all ranks.
    """

    axis: int
    groups: int = 1
    experts: int = 1

    @property
    def blocks(self) -> int:
        """Parts of the dimension that stand one behind the other, each with ranks of its own."""
        return self.groups * self.experts if self.axis == 0 else 1

    def length(self, rank: int) -> int:
        """Give the size of the dimension for a rank."""
        return rank * self.experts // (1 if self.axis == 0 else self.groups)

    def pad(self, factor: torch.Tensor, room: int) -> torch.Tensor:
        """Add zeros until the dimension has a size."""
        missing = (room - factor.shape[self.axis]) // self.blocks
        blocks = factor.unflatten(self.axis, (self.blocks, -1))
        return F.pad(blocks, [0, 0] * (blocks.dim() - self.axis - 2) + [0, missing]).flatten(self.axis, self.axis + 1)

    def cut(self, factor: torch.Tensor, rank: int) -> torch.Tensor:
        """Leave out what goes beyond a rank; a view if there are no blocks."""
        if self.blocks == 1:
            return factor.narrow(self.axis, 0, self.length(rank))
        blocks = factor.unflatten(self.axis, (self.blocks, -1))
        return blocks.narrow(self.axis + 1, 0, self.length(rank) // self.blocks).flatten(self.axis, self.axis + 1)


@dataclass(frozen=True)
class WithinRoom:
    """
    How a factor that has room for more ranks is saved: without the room, as the config says its rank.

    Attributes:
        place: where it has its ranks.
        rank: its rank.
        room: size of the dimension in the model.
    """

    place: RankAxis
    rank: int
    room: int

    endings = ("",)
    is_used = True

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Leave the room out."""
        return (self.place.cut(tensor, self.rank),)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put zeros in its place; what has another rank stays as it is."""
        if tensor.dim() <= self.place.axis or tensor.shape[self.place.axis] != self.place.length(self.rank):
            return tensor
        return self.place.pad(tensor, self.room)


class RanksLeft:
    """
    How a factor is saved once it is settled which ranks are left: without the others.

    Args:
        mask: for each rank of the model's tensor, whether it is left.
        axis: dimension of the factor that counts ranks.
    """

    endings = ("",)

    def __init__(self, mask: Sequence[bool], axis: int) -> None:
        self.rows, self.axis = len(mask), axis
        self.index = torch.tensor(mask, dtype=torch.bool).nonzero().flatten()

    @property
    def is_used(self) -> bool:
        """Whether the model has more ranks than are left."""
        return len(self.index) < self.rows

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Leave the others out."""
        return (tensor.index_select(self.axis, self.index.to(tensor.device)),)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put zeros in their place."""
        if tensor.shape[self.axis] != len(self.index):
            return tensor
        shape = list(tensor.shape)
        shape[self.axis] = self.rows
        return tensor.new_zeros(shape).index_copy(self.axis, self.index.to(tensor.device), tensor)
