# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Turning pairs of features in the plane that they span."""

import torch


def pair_factors(
    theta: torch.Tensor, alpha: torch.Tensor, variant: str, half: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Give what each feature is multiplied by, and what its partner is before it is added.

    Args:
        theta: angles; (features / 2,) for "road_1", (features,) for "road_2", (2 * features,) for "road_4".
        alpha: lengths, of the same shape.
        variant: which features share an angle: partners, none, or none and not even the two factors of one.
        half: partners are so many features apart.

    Returns:
        Two tensors (groups, 2, half).
    """
    cosines, sines = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_4":
        cosines, sines = cosines.view(-1, 2, 2, half)[:, 0], sines.view(-1, 2, 2, half)[:, 1]
    else:
        cosines, sines = (
            part.view(-1, 1 if variant == "road_1" else 2, half).expand(-1, 2, -1) for part in (cosines, sines)
        )
    return cosines, torch.stack((-sines[:, 0], sines[:, 1]), dim=1)


def turn_pairs(y: torch.Tensor, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Multiply each feature, and add its partner times another factor.

    Args:
        y: (..., features)
        own: factor of each feature, (groups, 2, half).
        others: factor of the partner of each feature.
    """
    pairs = y.unflatten(-1, own.shape)
    return torch.addcmul(own * pairs, others, pairs.flip(-2)).flatten(-3)


def determinants(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Give the determinant of the matrix of each pair, (groups, 1, half)."""
    return own.prod(dim=1, keepdim=True) - others.prod(dim=1, keepdim=True)
