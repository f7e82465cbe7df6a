# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Factors with room for more ranks than an adapter has, so that others can take its place without new shapes."""

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
