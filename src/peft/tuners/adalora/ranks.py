# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where AdaLoRA's factors count ranks, and how they are saved once it is settled which are left."""

from collections.abc import Sequence

import torch


# the dimension of a factor that counts ranks
RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


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
