# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Matrices that are one shard, repeated, and shards that change with the weight."""

import torch
import torch.nn.functional as F


def repeated(block: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """
    Repeat a shard over a matrix.

    Args:
        block: the shard, (r, columns): entry (o, i) of the matrix is entry (i mod r, o mod columns) of it.
        shape: size of the matrix, (out, in).
    """
    (out, inputs), (r, columns) = shape, block.shape
    return block.T.repeat(out // columns, -(-inputs // r))[:, :inputs]


def repeated_product(x: torch.Tensor, block: torch.Tensor, outputs: int) -> torch.Tensor:
    """
    Multiply by the transpose of a repeated shard, which is never built.

    Args:
        x: inputs, (..., in).
        block: the shard, (r, columns).
        outputs: rows of the matrix.

    Returns:
        Outputs, (..., out).
    """
    r, columns = block.shape
    missing = -x.shape[-1] % r
    pieces = F.pad(x, (0, missing)) if missing else x  # padding by nothing is a copy
    y = pieces.reshape(*x.shape[:-1], -1, r).sum(-2) @ block
    return y if columns == outputs else y.repeat(*(1,) * (y.dim() - 1), outputs // columns)


def change_of(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """
    Compute by how much a weight changes whose blocks W_gh become W_gh (I + D_g) + D_g.

    Args:
        weight: (out, in).
        blocks: D, (out / r, r, r).

    Returns:
        The change, (out, in), in the type of the blocks.
    """
    rows, r, _ = blocks.shape
    products = weight.to(blocks.dtype).reshape(rows, -1, r) @ blocks
    return (products.view(rows, r, -1, r) + blocks[:, :, None]).view(weight.shape)


def without_change(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """
    Compute the weight that was changed as `change_of` tells, in float32 at least.

    Args:
        weight: the changed weight, (out, in).
        blocks: D, (out / r, r, r).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, r, _ = blocks.shape
    blocks = blocks.to(dtype)
    shifted = (weight.to(dtype).view(rows, r, -1, r) - blocks[:, :, None]).reshape(rows, -1, r)
    identity = torch.eye(r, dtype=dtype, device=weight.device)
    return torch.linalg.solve(identity + blocks, shifted, left=False).view(weight.shape).to(weight.dtype)
