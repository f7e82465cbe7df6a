# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The forms that a part of GLoRA can have, each as a module with the tensors that checkpoints hold."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn


uniform_ = partial(nn.init.kaiming_uniform_, a=5**0.5)  # within 1 / sqrt(columns)


class GloraPath(nn.Module):
    """A part; called, it gives a tensor that can be broadcast."""

    def forward(self) -> torch.Tensor:
        """Give the part."""
        raise NotImplementedError

    def reset_parameters(self, init_weights: bool) -> None:
        """
        Start anew.

        Args:
            init_weights: True for zeros, False for random numbers.
        """


class GloraLoraPath(GloraPath):
    """
    A matrix of low rank.

    Args:
        out_features: rows.
        in_features: columns.
        r: rank.
        init_weights: see `reset_parameters`.

    Example:

        >>> GloraLoraPath(4, 3, r=2, init_weights=True)().shape
        torch.Size([4, 3])
    """

    def __init__(self, out_features: int, in_features: int, r: int, init_weights: bool) -> None:
        super().__init__()
        self.Xd = nn.Parameter(torch.empty(out_features, r))
        self.Xu = nn.Parameter(torch.empty(r, in_features))
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool) -> None:
        """Draw the second factor; the first one is zero, or drawn after it."""
        uniform_(self.Xu)
        self.Xd.zero_() if init_weights else uniform_(self.Xd)

    def forward(self) -> torch.Tensor:
        """Multiply the factors, (out, in)."""
        return self.Xd @ self.Xu


class GloraVectorPath(GloraPath):
    """
    A number per feature.

    Args:
        features: how many.
        is_column: whether the numbers stand one below the other, (features, 1).
        init_weights: see `reset_parameters`.

    Example:

        >>> GloraVectorPath(4, is_column=True, init_weights=True)().shape
        torch.Size([4, 1])
    """

    def __init__(self, features: int, is_column: bool, init_weights: bool) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.empty((features, 1) if is_column else (features,)))
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool) -> None:
        """Set all to zero, or draw them."""
        self.X.zero_() if init_weights else uniform_(torch.atleast_2d(self.X))

    def forward(self) -> torch.Tensor:
        """Give the numbers."""
        return self.X


class GloraScalarPath(GloraPath):
    """
    One number.

    Args:
        init_weights: see `reset_parameters`.

    Example:

        >>> GloraScalarPath(init_weights=True)().item()
        0.0
    """

    def __init__(self, init_weights: bool) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.empty(1))
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool) -> None:
        """Set it to zero, or draw it."""
        self.X.zero_() if init_weights else self.X.normal_(std=0.02)

    def forward(self) -> torch.Tensor:
        """Give the number, (1,)."""
        return self.X


class GloraEmptyPath(GloraPath):
    """
    Nothing. Checkpoints hold zeros in its place, in the model it is one of them.

    Args:
        shape: shape of the part.

    Example:

        >>> GloraEmptyPath((4, 3))().shape
        torch.Size([4, 3])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("zeros", torch.zeros(1))

    def forward(self) -> torch.Tensor:
        """Give zeros."""
        return self.zeros.expand(self.shape)


def make_part(form: str, size: tuple[int, ...], r: int) -> GloraPath:
    """
    Make a part, whose parameters have no content yet.

    Args:
        form: "lora", "vector", "constant" or "none".
        size: full shape of the part.
        r: rank.
    """
    if form == "none":
        return GloraEmptyPath(size)
    with torch.device("meta"):
        if form == "constant":
            return GloraScalarPath(True)
        return GloraLoraPath(*size, r, True) if form == "lora" else GloraVectorPath(size[0], len(size) == 2, True)


class ZerosInFull:
    """
    How nothing is saved.

    Args:
        shape: shape that readers expect.
    """

    endings, is_used = ("",), True

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor]:
        """Write as many zeros as readers expect."""
        return (tensor.expand(self.shape).contiguous(),)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep one."""
        return tensor.flatten()[:1].clone()
