# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Products of sparse rotations, and names of the released package around them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..families.rotations import BlockRotation, Rotation, cayley, identity_like


@dataclass(frozen=True)
class Butterfly(Rotation):
    """
    A product of block-diagonal matrices between which features are reordered.

    Factor i takes groups of 2^i neighbouring blocks, and gives each block half of its features from the first and half
    from the second half of the group.

    Args:
        blocks: (factors, features / b, b, b)
        first_is_outer: whether rows meet the last factor first.
    """

    blocks: torch.Tensor
    first_is_outer: bool = True

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features)."""
        order = range(len(self.blocks))
        for i in reversed(order) if self.first_is_outer else order:
            half = self.blocks.shape[-1] // 2
            rows = BlockRotation(self.blocks[i])(self._regroup(rows, 2, 2**i, half) if i else rows)
            rows = self._regroup(rows, 2**i, 2, half) if i else rows
        return rows

    @staticmethod
    def _regroup(rows: torch.Tensor, *sizes: int) -> torch.Tensor:
        return rows.unflatten(-1, (-1, *sizes)).transpose(-3, -2).flatten(-4)

    def transposed(self) -> "Butterfly":
        """Transpose each block and turn the order of the factors around."""
        return Butterfly(self.blocks.mT, not self.first_is_outer)


class FastBlockDiag(torch.autograd.Function):
    """Put blocks (z, n, b, b) on the diagonals of matrices (z, n b, n b), which are 0 elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        """
        Build the matrices.

        Args:
            input: blocks, (z, n, b, b).
        """
        count, size = input.shape[1], input.shape[-1]
        matrices = input.new_zeros(len(input), count, size, count, size)
        torch.diagonal(matrices, dim1=1, dim2=3).copy_(input.movedim(1, -1))
        return matrices.view(len(input), count * size, count * size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Note the sizes of the blocks."""
        ctx.sizes = inputs[0].shape[1], inputs[0].shape[-1]

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        """Treat the tangent as the blocks: the matrices are linear in them."""
        return FastBlockDiag.forward(tangent)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        """
        Take the blocks on the diagonals.

        Args:
            ctx: context of autograd.
            grad_output: (z, n b, n b)
        """
        count, size = ctx.sizes
        blocks = torch.diagonal(grad_output.reshape(-1, count, size, count, size), dim1=1, dim2=3)
        return blocks.movedim(-1, 1)


def get_fbd_cuda() -> None:
    """Give the compiled extension for block-diagonal matrices: there is none, and none is needed."""
    return


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """
    Set environment variables inside a context.

    Args:
        kwargs: name in any case -> value.

    Example:

        >>> import os
        >>> with patch_environment(peft_example=1):
        ...     os.environ["PEFT_EXAMPLE"]
        '1'
        >>> "PEFT_EXAMPLE" in os.environ
        False
    """
    before = {name.upper(): os.environ.get(name.upper()) for name in kwargs}
    os.environ.update({name.upper(): str(value) for name, value in kwargs.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class MultiplicativeDropoutLayer(nn.Module):
    """
    Dropout for products of rotations: while training, blocks of one factor become the identity.

    Args:
        p: share of the factor's blocks; the number is rounded down.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Replace blocks of a factor, both chosen at random.

        Args:
            x: blocks, (factors, n, b, b).

        Raises:
            PeftValueError: if the blocks are not square.
        """
        if x.shape[-1] != x.shape[-2]:
            raise PeftValueError(f"blocks must be square, found shape {tuple(x.shape)}")
        return drop_blocks(x, self.p) if self.training else x


def drop_blocks(blocks: torch.Tensor, p: float) -> torch.Tensor:
    """
    Replace blocks of a factor by the identity, both chosen at random.

    Args:
        blocks: (factors, n, b, b).
        p: share of the factor's blocks; the number is rounded down.
    """
    factors, count = blocks.shape[:2]
    dropped = int(p * count)
    if dropped == 0:
        return blocks
    chosen = torch.rand(count, device=blocks.device).argsort() < dropped
    factor = torch.arange(factors, device=blocks.device) == torch.randint(factors, (1,), device=blocks.device)
    return torch.where((factor.unsqueeze(1) & chosen)[..., None, None], identity_like(blocks), blocks)


def number_of_factors(wanted: int) -> int:
    """Give the number of factors that a new adapter has on this machine."""
    if wanted != 1 and not torch.cuda.is_available():
        warn(
            f"boft_n_butterfly_factor={wanted} is used as 1, since there is no CUDA device: the released package does "
            "the same, and adapters have the same shapes in both"
        )
        return 1
    return wanted


def check_factors(factors: int, features: int, size: int) -> None:
    """Refuse factors that the features cannot be grouped for."""
    if factors < 1:
        raise PeftValueError(f"boft_n_butterfly_factor must be at least 1, found {factors}")
    if factors > 1 and (size % 2 or features % (size * 2 ** (factors - 1))):
        raise PeftValueError(
            f"boft_n_butterfly_factor={factors} with blocks of {size} needs an even block size and a number of "
            f"features divisible by {size * 2 ** (factors - 1)}, found {features}; use fewer factors or other blocks"
        )


class ReleasedFunctions:
    """Functions that the released package has on its layers."""

    def perm2mat(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Build a permutation matrix.

        Args:
            indices: column of the 1 in each row.
        """
        return torch.eye(len(indices), device=indices.device)[indices]

    def block_butterfly_perm(self, n: int, b: int, r: int = 3, n_butterfly_factor: int = 1) -> torch.Tensor:
        """
        Give the order in which a factor takes features: of each group first the even, then the odd chunks.

        Args:
            n: number of features.
            b: number of groups.
            r: features per chunk, half of a block.
            n_butterfly_factor: index of the factor; the first one, 0, leaves the order.

        Raises:
            PeftValueError: if the chunks do not fit into the groups in pairs.
        """
        if n_butterfly_factor == 0:
            return torch.arange(n)
        if n % (2 * b * r):
            raise PeftValueError(f"pairs of chunks of {r} do not fit into {b} groups of {n} features")
        return torch.arange(n).view(b, -1, 2, r).transpose(1, 2).flatten()

    def cayley_batch(self, data: torch.Tensor) -> torch.Tensor:
        """
        Turn square matrices into rotations, by their skew-symmetric parts.

        Args:
            data: (n, b, b)
        """
        return cayley((data - data.mT) / 2)
