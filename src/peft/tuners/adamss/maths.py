# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Clusters of rows, the starts of their changes, and how important these are."""

import warnings
from dataclasses import dataclass

import torch

from ...utils.error import PeftRuntimeError


@dataclass
class Subspaces:
    """
    A weight, cut into clusters of rows.

    Attributes:
        rows: for each cluster the numbers of its rows.
        left: left singular vectors, (out, r).
        right: right singular vectors, (r, columns).
    """

    rows: list[torch.Tensor]
    left: torch.Tensor
    right: torch.Tensor


def check_decomposable(weight: torch.Tensor) -> None:
    """
    Refuse a weight that has no decomposition.

    Args:
        weight: any tensor; of one without storage nothing is known.

    Raises:
        PeftRuntimeError: if an entry is not finite.
    """
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise PeftRuntimeError(
            "a weight with entries that are not finite cannot be decomposed; load the base model's weights first"
        )


def decompose(weight: torch.Tensor, r: int, clusters: int, seed: int) -> Subspaces:
    """
    Cut a weight into clusters of rows with similar left singular vectors.

    Args:
        weight: (out, columns), in float32.
        r: number of singular vectors, at most.
        clusters: their number, at most.
        seed: of the decomposition; what is drawn afterwards does not depend on it.

    Raises:
        RuntimeError: if the weight has no decomposition.
    """
    check_decomposable(weight)
    right, left = slice_pca(weight[None, None], r, weight.device, random_seed=seed)
    labels, _ = clustering_Z(left[0, 0], min(clusters, weight.shape[0]), 10)
    rows = seg_locations(labels).values()
    return Subspaces([own for own in rows if len(own)], left[0, 0], right[0, 0])


def slice_pca(
    tensor: torch.Tensor,
    r: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    random_seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the greatest singular vectors of matrices. Numbers that are drawn afterwards do not depend on it.

    Args:
        tensor: (a, b, rows, columns).
        r: how many, at most.
        device: where they are computed.
        dtype: type in which they are.
        random_seed: what the generator is seeded with before the first matrix.

    Returns:
        Right ones, (a, b, r, columns), and left ones, (a, b, rows, r).
    """
    *sizes, rows, columns = tensor.shape
    r, matrices = min(r, rows, columns), tensor.to(device, dtype).reshape(-1, rows, columns)
    with torch.random.fork_rng([matrices.device] if matrices.is_cuda else []):
        torch.manual_seed(random_seed)
        found = [torch.svd_lowrank(matrix, q=r, niter=2) for matrix in matrices]
    left, _, right = (torch.stack(vectors) for vectors in zip(*found, strict=True))
    return right.mT.reshape(*sizes, r, columns), left.reshape(*sizes, rows, r)


def clustering_Z(VT: torch.Tensor, num_subspaces: int, iternum: int) -> tuple[torch.Tensor, int]:
    """
    Cut rows into clusters. Which row is in which does not depend on what was drawn before.

    Args:
        VT: (rows, r).
        num_subspaces: number of clusters.
        iternum: greatest number of steps.

    Returns:
        The number of its cluster for each row, (rows,), and the number of clusters.
    """
    from sklearn.cluster import KMeans

    means = KMeans(n_clusters=num_subspaces, init="random", n_init=1, max_iter=iternum, random_state=123456789)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different rows than clusters
        labels = means.fit_predict(VT.detach().cpu().numpy())
    return torch.as_tensor(labels).long(), num_subspaces


def seg_locations(index: torch.Tensor) -> dict[int, torch.Tensor]:
    """
    Give the rows of each cluster, rising.

    Args:
        index: the number of its cluster for each row, (rows,).
    """
    return {label: (index == label).nonzero()[:, 0] for label in range(int(index.max()) + 1)}


def get_trainable_subspaces(num_subspaces: int) -> list[int]:
    """
    Give the numbers of the clusters that are trained at first, which are all.

    Args:
        num_subspaces: number of clusters.
    """
    return list(range(num_subspaces))


def start_of(left: torch.Tensor, rank: int, threshold: float | None) -> torch.Tensor:
    """
    Compute the directions in which a cluster may change.

    Args:
        left: left singular vectors of its rows, (rows, r).
        rank: number of directions, at most.
        threshold: share of the largest singular value that those of other directions exceed; None for no such bound.

    Returns:
        Orthonormal rows, (rank, r).
    """
    products, rank = left @ left.T, min(rank, *left.shape)
    if threshold is not None:
        values = torch.svd_lowrank(products, q=len(left), niter=2)[1]
        rank = max(1, min(rank, int((values > threshold * values[0]).sum())))
    directions = torch.svd_lowrank(products, q=rank, niter=2)[0][:, :rank]
    return torch.linalg.qr(left.T @ directions)[0].T


def track(
    state: tuple[torch.Tensor, torch.Tensor] | None, parameter: torch.Tensor, betas: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Follow how important numbers are, and how uncertain that is.

    Args:
        state: importance and uncertainty so far; None at first.
        parameter: the numbers, with a gradient.
        betas: how slowly importance and uncertainty forget.
    """
    now = (parameter.detach() * parameter.grad).abs()
    importance, uncertainty = state or (torch.zeros_like(now), torch.zeros_like(now))
    uncertainty = betas[1] * uncertainty + (1 - betas[1]) * (now - importance).abs()
    return betas[0] * importance + (1 - betas[0]) * now, uncertainty


def number_to_keep(total: int, target: int, progress: float, exponent: float) -> int:
    """
    Say how many of all clusters go on being trained.

    Args:
        total: number of clusters.
        target: how many at the end.
        progress: how much of the schedule is over, from 0 to 1.
        exponent: how much sooner than evenly clusters are frozen.
    """
    return int(target + (total - target) * (1 - progress) ** exponent)
