# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Rotations in blocks, as matrices of a series or of an inverse, and the modules that hold them."""

import math

import torch
from torch import nn

from ...utils.error import PeftValueError
from ..families.rotations import BlockRotation, cayley, cayley_neumann, full_precision, identity_like


def skew_symmetric(entries: torch.Tensor, size: int) -> torch.Tensor:
    """
    Build skew-symmetric matrices from what stands above their diagonals, row by row.

    Args:
        entries: (n, size * (size - 1) / 2)
        size: rows of each matrix.

    Returns:
        (n, size, size)
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    matrices = entries.new_zeros(len(entries), size * size).index_copy(1, rows * size + columns, entries)
    matrices = matrices.view(-1, size, size)
    return matrices - matrices.mT


def nearest_divisor(number: int, wanted: int) -> int:
    """Find the divisor of a number that is nearest to the one that is wanted; of two, the smaller."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


# ---------------------------------------------------------------------------------------------------------- modules
class MultiplicativeDropoutLayer(nn.Module):
    """
    Dropout for rotations: while training, some of the blocks become the identity.

    Args:
        p: share of the blocks; the number is rounded down.

    Example:

        >>> import torch
        >>> dropout = MultiplicativeDropoutLayer(0.5)
        >>> turned = dropout(torch.zeros(4, 2, 2))
        >>> (turned == torch.eye(2)).all(dim=(1, 2)).sum()
        tensor(2)
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Replace blocks that are chosen at random.

        Args:
            x: blocks, (n, b, b); a single one is left as it is.

        Raises:
            PeftValueError: if the blocks are not square.
        """
        if x.shape[-1] != x.shape[-2]:
            raise PeftValueError(f"blocks must be square, found shape {tuple(x.shape)}")
        return drop_blocks(x, self.p) if self.training else x


def drop_blocks(blocks: torch.Tensor, p: float) -> torch.Tensor:
    """
    Replace blocks that are chosen at random by the identity.

    Args:
        blocks: (n, b, b); a single one is left as it is.
        p: share of the blocks; the number is rounded down.
    """
    dropped = int(p * len(blocks))
    if dropped == 0 or len(blocks) == 1:
        return blocks
    chosen = torch.rand(len(blocks), device=blocks.device).argsort() < dropped
    return torch.where(chosen.view(-1, 1, 1), identity_like(blocks), blocks)


class OFTRotationModule(nn.Module):
    """
    The rotation of one adapter in one layer.

    Args:
        r: number of blocks that are learned.
        n_elements: numbers per block: b (b - 1) / 2 for blocks of b features.
        block_size: features per block.
        in_features: features that are rotated.
        coft: whether `eps` holds.
        eps: greatest norm of the skew-symmetric matrices of all blocks together.
        block_share: whether one block is used for all features.
        kernel_size: kept for callers of the released package; `in_features` counts the kernel's entries already.
        use_cayley_neumann: sum a series in place of a matrix inverse.
        num_cayley_neumann_terms: terms of the series.

    Example:

        >>> import torch
        >>> module = OFTRotationModule(r=2, n_elements=1, block_size=2, in_features=4, use_cayley_neumann=False)
        >>> module.weight.data.fill_(1.0)
        tensor([[1.],
                [1.]])
        >>> module(torch.tensor([1.0, 0.0, 0.0, 2.0])).detach() + 0.0
        tensor([ 0., -1.,  2.,  0.])
    """

    def __init__(
        self,
        r: int,
        n_elements: int,
        block_size: int,
        in_features: int,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        kernel_size: tuple[int, int] = (0, 0),
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
    ) -> None:
        super().__init__()
        self.r, self.n_elements, self.block_size, self.in_features = r, n_elements, block_size, in_features
        self.coft, self.eps, self.block_share, self.kernel_size = coft, eps, block_share, kernel_size
        self.use_cayley_neumann, self.num_cayley_neumann_terms = use_cayley_neumann, num_cayley_neumann_terms
        self.weight = nn.Parameter(torch.zeros(r, n_elements))

    def blocks(self) -> torch.Tensor:
        """Compute the blocks, (r, block_size, block_size), that rows are multiplied by from the right."""
        weight = self.weight
        if self.coft and isinstance(weight, nn.Parameter):
            self.project_()
        elif self.coft:  # a functional call has put a tensor of the caller's here, who shall find it unchanged
            weight = weight + (self.projected(weight) - weight).detach()
        skew = skew_symmetric(full_precision(weight), self.block_size)
        return cayley_neumann(skew, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(skew)

    @torch.no_grad()
    def project_(self) -> None:
        """Bring blocks that have left the ball that `eps` allows back to its surface; a step of projected descent."""
        self.weight.data.copy_(self.projected(self.weight.data))

    def projected(self, weight: torch.Tensor) -> torch.Tensor:
        """
        Compute what `project_` makes of a weight.

        Args:
            weight: of the shape of this module's; it stays as it is.
        """
        # every entry stands in its matrix twice, and each block has an equal part in the sum of squares
        radius = self.eps / math.sqrt(2 * len(weight))
        norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        shrink = (radius / norms).nan_to_num(1.0)
        # what lies on the surface but for rounding stays as it is, or each forward pass would give something else
        is_outside = shrink < 1 - 8 * torch.finfo(shrink.dtype).eps
        return weight * torch.where(is_outside, shrink, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Rotate rows.

        Args:
            x: (..., in_features)
        """
        return BlockRotation(self.blocks())(x)

    def get_weight(self) -> torch.Tensor:
        """Build the matrix that rows are multiplied by, (in_features, in_features)."""
        return self(torch.eye(self.in_features, dtype=self.weight.dtype, device=self.weight.device))
