# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that stand in a checkpoint in another form than in the model."""

from typing import Protocol

import torch


class SavedForm(Protocol):
    """
    How a tensor is written to a checkpoint as several others, and read back from them.

    Attributes:
        endings: what is put behind the tensor's key, for each of the others.
        is_used: whether the tensor is written like that. It is read in either form.
    """

    endings: tuple[str, ...]
    is_used: bool

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn the model's tensor into those of the checkpoint, in the order of `endings`."""

    def read(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Turn the tensors of a checkpoint into the model's."""


class JoinedForm(Protocol):
    """
    How several tensors are written to a checkpoint as one, and read back from it.

    Attributes:
        names: keys that the tensors would have in a checkpoint if each stood there by itself.
    """

    names: tuple[str, ...]

    def join(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Turn the model's tensors, in the order of `names`, into that of the checkpoint."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Turn the tensor of a checkpoint into the model's, in the order of `names`.

        One of another shape than `join` gives is no error here: what comes of it does not fit, and is reported.
        """
