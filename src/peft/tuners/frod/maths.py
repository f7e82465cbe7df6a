# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Roles of FRoD's layers, the basis that those of one role share, and where its core has entries."""

from collections.abc import Sequence

import torch


def role_of(name: str) -> str:
    """
    Tell what a layer is for, from its name: its last two parts, or the last if a number stands before it.

    Args:
        name: full name of the layer.
    """
    parts = name.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"  # the feed-forward layer of the same model ends in "output.dense", too
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])


def block_of(name: str, default: int) -> int:
    """
    Tell the block that a layer belongs to: the number behind "layers", or the first number in its name.

    Args:
        name: full name of the layer.
        default: the answer for a name without numbers.
    """
    parts = name.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return int(next((part for part in [*behind, *parts] if part.isdigit()), default))


def common_basis(weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """
    Compute a basis in which the inputs of several weights are described, (in, in), its vectors being columns.

    Args:
        weights: (out, in) each.
        alpha: what is added to the diagonals of the matrices that are inverted.
    """
    stacked = torch.cat([weight.float().cpu() for weight in weights])
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T.contiguous()
    q, r = torch.linalg.qr(stacked)
    identity = torch.eye(q.shape[1])
    parts = q.split([weight.shape[0] for weight in weights])
    mean = torch.stack([torch.linalg.inv(part.T @ part + alpha * identity) for part in parts]).mean(0)
    return r.T @ torch.linalg.eigh(mean).eigenvectors


def number_of_pairs(n: int, rate: float) -> int:
    """
    Count the entries of a core beside its diagonal.

    Args:
        n: its size, (n, n).
        rate: share of them.
    """
    return max(min(int(n * n * rate), n * (n - 1)), int(rate > 0 and n > 1))


def random_pairs(n: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """
    Draw where a core has entries beside its diagonal, (2, number): rows and columns.

    Args:
        n: its size, (n, n).
        rate: share of the entries.
        generator: what it is drawn from.
    """
    count = number_of_pairs(n, rate)
    chosen = torch.randperm(n * (n - 1), generator=generator)[:count] if count else torch.empty(0, dtype=torch.int64)
    rows, columns = chosen // max(n - 1, 1), chosen % max(n - 1, 1)
    return torch.stack([rows, columns + (columns >= rows)])  # rows skip their diagonal


def factor(weight: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Write a weight as U diag(l) V'.

    Args:
        weight: (out, in)
        v: (in, in)

    Returns:
        U (out, in), with columns of length 1, and l (in,), in the type of the weight.
    """
    weight64, v64 = weight.double(), v.double()
    try:
        rotated = torch.linalg.solve(v64, weight64.T).T
    except torch.linalg.LinAlgError:  # a basis of weights that have the same null space
        rotated = weight64 @ torch.linalg.pinv(v64, rtol=1e-6).T
    lengths = rotated.norm(dim=0)
    u = torch.where(lengths > 1e-12, rotated / lengths, 0.0)
    return u.to(weight.dtype), lengths.to(weight.dtype)


def core(diagonal: torch.Tensor, values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """
    Put a core together, (n, n).

    Args:
        diagonal: (n,)
        values: (number,), what stands beside the diagonal.
        pairs: (2, number), where: rows and columns.
    """
    n = diagonal.numel()
    places = torch.cat([torch.arange(n, device=pairs.device) * (n + 1), pairs[0] * n + pairs[1]])
    return diagonal.new_zeros(n * n).scatter(0, places, torch.cat([diagonal, values])).view(n, n)


def version_of(tensor: torch.Tensor) -> int:
    """Count the changes in place, which torch does not do in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def small_normal_(dtype: torch.dtype, tensor: torch.Tensor) -> None:
    """
    Write normal numbers with a deviation of 0.1 into a tensor.

    Args:
        dtype: type of the base weight, in which they are drawn; anything, if it is quantised.
        tensor: where they are written.
    """
    dtype = dtype if dtype.is_floating_point else tensor.dtype
    tensor.copy_(torch.empty(tensor.shape, dtype=dtype).normal_(std=0.1))
