# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What TinyLoRA takes from a weight, and from seeds."""

import torch


def singular_factors(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the part of a matrix that its first singular vectors span, as a product.

    Args:
        weight: (rows, columns)
        r: how many of them.

    Returns:
        (rows, r) and (r, columns), each with the roots of the singular values, in the type of the matrix.
    """
    u, s, vh = (part.to(weight.dtype) for part in torch.linalg.svd(weight.float(), full_matrices=False))
    roots = s[:r].sqrt()
    return (u[:, :r] * roots).contiguous(), roots.unsqueeze(1) * vh[:r]


def directions(seed: int, u: int, r: int) -> torch.Tensor:
    """
    Draw the matrices that a vector mixes, with a variance of 1 / r.

    Args:
        seed: of a generator of their own.
        u: how many.
        r: their size.

    Returns:
        (u, r, r)
    """
    return torch.normal(0.0, r**-0.5, (u, r, r), generator=torch.Generator().manual_seed(seed))


def uniform_(bound: float, dtype: torch.dtype, v: torch.Tensor) -> None:
    """
    Draw a vector in the type of a weight.

    Args:
        bound: largest magnitude.
        dtype: of the weight; anything, if it is quantised.
        v: where it is written.
    """
    v.copy_(
        torch.empty_like(v, device="cpu", dtype=dtype if dtype.is_floating_point else None).uniform_(-bound, bound)
    )
