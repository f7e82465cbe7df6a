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
    from sklearn.cluster import KMeans

    if not torch.isfinite(weight).all():
        raise PeftRuntimeError(
            "a weight with entries that are not finite cannot be decomposed; load the base model's weights first"
        )
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        left, _, right = torch.svd_lowrank(weight, q=min(r, *weight.shape), niter=2)
    clusters = min(clusters, weight.shape[0])
    means = KMeans(n_clusters=clusters, init="random", n_init=1, max_iter=10, random_state=123456789)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different rows than clusters
        labels = torch.as_tensor(means.fit_predict(left.cpu().numpy())).long()
    rows = [(labels == label).nonzero()[:, 0] for label in range(clusters)]
    return Subspaces([own for own in rows if len(own)], left, right.T)


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
