# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How skills start, and how they are mixed."""

import math

import torch
from torch import nn


@torch.no_grad()
def draw_skills_(factors: torch.Tensor) -> None:
    """
    Draw each factor of each skill as a linear layer draws its weight.

    Args:
        factors: (splits, skills, inputs, outputs), where it is written.
    """
    splits, skills, inputs, outputs = factors.shape
    for skill in range(skills):
        for split in range(splits):
            drawn = torch.empty(outputs, inputs, dtype=factors.dtype, device=factors.device)
            factors[split, skill] = nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)).T


def mix(shares: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mix skills.

    Args:
        shares: (batch, splits, skills)
        a: (splits, skills, in / splits, r)
        b: (splits, skills, r, out / splits)

    Returns:
        (batch, in, r) and (batch, r, out)
    """
    shares = shares.to(a.dtype).transpose(0, 1)  # products of matrices, as einsum costs more for small ones
    mixed_a, mixed_b = ((shares @ side.flatten(2)).unflatten(2, side.shape[2:]) for side in (a, b))
    return mixed_a.transpose(0, 1).flatten(1, 2), mixed_b.permute(1, 2, 0, 3).flatten(2)
