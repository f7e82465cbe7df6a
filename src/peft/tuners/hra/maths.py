# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Products of Householder reflections."""

from dataclasses import dataclass

import torch

from ..families.rotations import Rotation


@dataclass(frozen=True)
class Reflections(Rotation):
    """
    A product of Householder reflections in the compact form I - U T U'.

    Args:
        directions: U, (features, r), columns of length 1.
        core: T, (r, r).
    """

    directions: torch.Tensor
    core: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features) at the cost of two products with U."""
        rows = rows.to(self.directions.dtype)
        return rows - (rows @ self.directions) @ (self.core @ self.directions.mT)

    def transposed(self) -> "Reflections":
        """Give the reflections in the opposite order."""
        return Reflections(self.directions, self.core.mT)


def reflections(directions: torch.Tensor) -> Reflections:
    """
    Give the product of the reflections H_i = I - 2 u_i u_i' in the order of the columns, H_1 H_2 ... H_r.

    Args:
        directions: (features, r), columns of any length; one of length 0 reflects nothing.
    """
    # as `F.normalize` does, by fewer calls, of which the time of one token consists
    unit = directions / torch.linalg.vector_norm(directions, dim=0, keepdim=True).clamp_min(1e-12)
    # the inverse of T has the products of earlier with later columns above its diagonal, and 1/2 on it
    identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    inverse = torch.add((unit.mT @ unit).triu(1), identity, alpha=0.5)
    return Reflections(unit, torch.linalg.solve_triangular(inverse, identity, upper=True))


def orthogonal_reflections(directions: torch.Tensor) -> Reflections:
    """
    Give the product of reflections at the columns after Gram-Schmidt: minus the identity in the space that they span.

    Args:
        directions: (features, r), linearly independent columns.
    """
    unit, _ = torch.linalg.qr(directions)
    return Reflections(unit, 2 * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device))
