# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The bases of RandLoRA: how they are drawn, and how they are scaled."""

import math
from typing import Any

import torch

from ...utils.own_derivative import OwnDerivative


def random_basis(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """
    Draw one basis with a standard deviation of 1, in bfloat16, uniformly; the same with every version of torch.

    Args:
        shape: (r, 1, columns), or (rows, products, r), which is drawn product by product.
        generator: what it is drawn from.
    """
    bound = 1 / math.sqrt(shape[2])
    pieces = [
        torch.empty(shape[0], 1, shape[2], dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        for _ in range(shape[1])
    ]
    # as torch 2.13 draws bfloat16 itself, bounds included; older versions draw other numbers, which files do not fit
    basis = torch.cat(pieces, dim=1).to(torch.bfloat16)
    basis[basis == basis.new_tensor(bound)] = -bound
    return basis / basis.std()


def sparse_basis(shape: tuple[int, ...], q: float, generator: torch.Generator) -> torch.Tensor:
    """
    Draw one basis with a standard deviation of 1, of which most entries are 0.

    Args:
        shape: its shape.
        q: one in q entries is not 0, but -1 or 1 before the basis is scaled.
        generator: what it is drawn from.
    """
    drawn = torch.rand(shape, dtype=torch.float32, generator=generator)
    basis = (drawn > 1 - 1 / (2 * q)).float() - (drawn < 1 / (2 * q)).float()
    deviation = basis.std()
    return basis / deviation if deviation > 0 else basis  # one without entries cannot be scaled


class UniqueBaseGrad(OwnDerivative):
    """Product of a basis and its scalings; no gradient of the basis, and nothing of the product's size, is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(randlora_A: torch.Tensor, randlora_lambda: torch.Tensor, randlora_gamma: torch.Tensor) -> torch.Tensor:
        """
        Compute the scaled basis, (r, n, columns).

        Args:
            randlora_A: (r, 1, columns)
            randlora_lambda: (r, n)
            randlora_gamma: (n, columns)
        """
        return (randlora_A * randlora_lambda.unsqueeze(2)).mul_(randlora_gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep the factors."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Compute the gradients of the scalings."""
        basis, scales, columns = ctx.saved_tensors
        terms = (grad_output * basis).transpose(0, 1)  # (n, r, columns)
        d_scales = (terms @ columns.unsqueeze(2)).squeeze(2).T
        return None, d_scales, (scales.T.unsqueeze(1) @ terms).squeeze(1)
