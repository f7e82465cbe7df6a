# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's computations with tensors alone: what starts, and what variants need."""

import math
from collections.abc import Callable, Sequence

import torch


# singular vectors beyond those wanted that a randomised decomposition computes (Halko et al. 2011 advise 5 to 10)
_OVERSAMPLING = 8
# blocks of a Krylov space that are orthogonalised, and how often it is begun anew
_KRYLOV_BLOCKS, _KRYLOV_RESTARTS = 6, 4
# start of a sequence in which some tokens do not stand, beyond any length
NEVER = 1 << 40
# rows of a merged weight that are computed at a time where the factors have another type than the weight
MERGE_ROWS = 4096


def leading_singular_vectors(
    weight: torch.Tensor, count: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Decompose a matrix approximately, by subspace iteration (Halko et al. 2011, arXiv:0909.4061).

    It starts from the same numbers whenever it is called, on whatever device: an adapter that is loaded takes out of
    the base weight what it took out when it was trained.

    Args:
        weight: (out, in).
        count: how many singular vectors are wanted; there are some more in the result.
        iterations: how often the subspace is improved.

    Returns:
        U, S and the transpose of V.
    """
    wanted = min(count + _OVERSAMPLING, *weight.shape)
    numbers = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(0), device="cpu")
    basis = torch.linalg.qr(weight @ numbers.to(weight)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.T @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vh


def leading_eigenvectors(
    apply: Callable[[torch.Tensor], torch.Tensor], size: int, count: int, device: torch.device
) -> torch.Tensor | None:
    """
    Find the eigenvectors of the greatest eigenvalues of a symmetric positive matrix that is only multiplied with.

    Blocks of a Krylov space (Musco, Musco 2015, arXiv:1504.05477), begun anew from what was found until it is precise
    to ten digits. It starts from the same numbers whenever it is called.

    Args:
        apply: multiplies the matrix with (size, some), in float64.
        size: rows of the matrix.
        count: how many eigenvectors.
        device: where they are.

    Returns:
        (size, count), in descending order of eigenvalues; None where a full decomposition is as fast, or where the
        eigenvalues are too near to each other.
    """
    width = count + _OVERSAMPLING
    if size < 2 * width * _KRYLOV_BLOCKS:
        return None
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float64)
    block = torch.linalg.qr(start.to(device)).Q
    for _ in range(_KRYLOV_RESTARTS):
        basis, images = [block], []
        for _ in range(_KRYLOV_BLOCKS - 1):
            images.append(apply(basis[-1]))
            known, new = torch.cat(basis, dim=1), images[-1]
            for _ in range(2):  # once leaves what rounding has brought in
                new = new - known @ (known.T @ new)
            basis.append(torch.linalg.qr(new).Q)
        images.append(apply(basis[-1]))
        space, image = torch.cat(basis, dim=1), torch.cat(images, dim=1)
        values, vectors = torch.linalg.eigh(space.T @ image)
        values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
        block = space @ vectors
        residual = (image @ vectors[:, :count] - block[:, :count] * values[:count]).norm(dim=0)
        if residual.max() <= 1e-10 * values[0]:
            return block[:, :count]
        block = torch.linalg.qr(block).Q
    return None


def trailing_left_vectors(weight: torch.Tensor, count: int) -> torch.Tensor:
    """
    Give the left singular vectors of a matrix that belong to its smallest singular values.

    They come from the Gram matrix of the smaller side, in float64, which is faster than a decomposition in float32 and
    as precise, and needs no room for the other singular vectors.

    Args:
        weight: (out, in)
        count: how many, at most the smaller side.

    Returns:
        (out, count), orthonormal, that of the smallest one last; float64.
    """
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        return torch.linalg.eigh(wide @ wide.T).eigenvectors[:, :count].flip(1)
    right = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)
    # of a weight of less than full rank, the last ones are only told by being orthogonal to those before
    return torch.linalg.qr(wide @ right).Q[:, -count:]


def squares_added(
    rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scaling: float, groups: int = 1
) -> torch.Tensor:
    """
    Compute what is added to the squared norm of each row of a weight W by a product of factors, without that product.

    ||w + s b A||^2 = ||w||^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>, for rows w of W and b of B.

    Args:
        rows: W, (out, in), in a type that may be less precise than that of the factors.
        b: B, (out, r); for several groups (out, r / groups).
        a: A, (r, in).
        scaling: s.
        groups: groups of a convolution.

    Returns:
        (out,), in the type of the factors.
    """
    if groups > 1:
        # The delta of a grouped convolution does not have the shape of its weight. In its place, release 0.21.2 takes
        # the product of the factors in the order of their storage, and adapters are trained with that.
        b = b.reshape(-1, a.shape[0])
        rows, a = (
            matrix.view(len(matrix), -1, rows.shape[1]).transpose(0, 1) for matrix in (rows.view(len(b), -1), a)
        )
    gram = a @ a.mT
    met = (rows @ a.mT.to(rows.dtype)).to(b.dtype)
    added = ((2 * scaling * met + scaling * scaling * (b @ gram)) * b).sum(-1)
    return added if groups == 1 else added.T.flatten()


def find_invocations(ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """
    Find the last place of a sequence of tokens in each row.

    Args:
        ids: (batch, length) token ids.
        tokens: what to look for.

    Returns:
        (batch,) index of the first of the tokens; a number beyond any length where they do not stand in the row.
    """
    nowhere = torch.full((len(ids),), NEVER, device=ids.device)
    if ids.shape[1] < len(tokens):
        return nowhere
    windows = ids.unfold(1, len(tokens), 1)
    found = (windows == torch.tensor(tokens, device=ids.device)).all(-1)
    last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
    return torch.where(found.any(1), last, nowhere)


def uniform_by_fan_in(weight: torch.Tensor) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as `nn.Linear` does; weight is (out, in)."""
    bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
    weight.uniform_(-bound, bound)


def add_product_(left: torch.Tensor, right: torch.Tensor, matrix: torch.Tensor, scale: float) -> None:
    """
    Add a product of two matrices to a third one in place.

    Args:
        left: (rows, r).
        right: (r, columns).
        matrix: (rows, columns), may be of another type.
        scale: multiple of the product to add.
    """
    if left.dtype == matrix.dtype and left.device == matrix.device:
        matrix.addmm_(left, right, alpha=scale)
        return
    left, right = left.to(matrix.device), right.to(matrix.device)
    for start in range(0, matrix.shape[0], MERGE_ROWS):
        rows = slice(start, start + MERGE_ROWS)
        matrix[rows] += (left[rows] @ right).mul_(scale).to(matrix.dtype)


def without_smallest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """
    Take the smallest singular components out of a matrix.

    Args:
        weight: (out, in).
        count: how many.

    Returns:
        A new matrix of the same type.
    """
    u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    kept = len(s) - count
    return ((u[:, :kept] * s[:kept]) @ vh[:kept]).to(weight.dtype)
