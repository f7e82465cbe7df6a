# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA's computations with tensors alone: which ranks count most, and how far from orthonormal factors are."""

from collections.abc import Mapping

import torch


# the dimension of a factor that counts ranks
RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


def greatest(values: Mapping[str, torch.Tensor], count: int) -> dict[str, list[bool]]:
    """
    Choose the greatest of all values; those that equal the greatest one that is not chosen are not chosen either.

    Args:
        values: name -> one number per rank, (r,).
        count: how many to choose.

    Returns:
        Name -> for each number, whether it is chosen.
    """
    everything = torch.cat([own.cpu() for own in values.values()])
    surplus = everything.numel() - count
    if surplus <= 0:
        return {name: [True] * len(own) for name, own in values.items()}
    threshold = torch.kthvalue(everything, surplus).values.item()
    return {name: (own > threshold).tolist() for name, own in values.items()}


def distances_from_orthonormal(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """
    Compute how far the rows of A and the columns of B are from orthonormal ones.

    Args:
        a: (r, in).
        b: (out, r).

    Returns:
        A number for each of them; none without ranks.
    """
    products = (a @ a.T, b.T @ b)
    return [torch.linalg.matrix_norm(p - torch.eye(len(p)).to(p)) for p in products if len(p)]
