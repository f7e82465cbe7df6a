# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Splitting a matrix after its leading singular directions, and keeping gradients out of these."""

from typing import Any

import torch
from torch import nn

from ...utils.own_derivative import OwnDerivative


def split(weight: torch.Tensor, k: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """
    Decompose a matrix into U diag(S) V, and split that after the greatest singular values.

    Args:
        weight: (out, in)
        k: how many are great.

    Returns:
        U (out, k), S (k,) and V (k, in), and the same for the others; in float32.
    """
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    parts = (u[:, :k], s[:k], v[:k]), (u[:, k:], s[k:], v[k:])
    return tuple(tuple(tensor.contiguous() for tensor in part) for part in parts)


def kept_apart(gradient: torch.Tensor, basis: torch.Tensor, is_complement: bool) -> torch.Tensor:
    """
    Take out of the columns of a matrix what lies in a subspace.

    Args:
        gradient: (n, m)
        basis: orthonormal columns (n, k) of the subspace.
        is_complement: whether they are those of all that is to stay instead.
    """
    basis = basis.to(gradient.dtype)
    inside = basis @ (basis.mT @ gradient)
    return inside if is_complement else gradient - inside


class _KeptApart(OwnDerivative):
    """The identity, whose gradient is taken out of a subspace; it survives whatever replaces parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(columns: torch.Tensor, basis: torch.Tensor, is_complement: bool) -> torch.Tensor:
        return columns.view_as(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, basis, ctx.is_complement = inputs
        ctx.save_for_backward(basis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (basis,) = ctx.saved_tensors
        exact = torch.promote_types(gradient.dtype, torch.float32)  # rounding would lead back into the subspace
        return kept_apart(gradient.to(exact), basis, ctx.is_complement).to(gradient.dtype), None, None


def with_gradient_apart(columns: torch.Tensor, basis: torch.Tensor, is_complement: bool) -> torch.Tensor:
    """
    Give a matrix as it is, into which gradients flow as `kept_apart` leaves them.

    Args:
        columns: (n, m)
        basis: see `kept_apart`.
        is_complement: see there.
    """
    return _KeptApart.of(columns, basis, is_complement)


def decompose_weight_matrix(weight: torch.Tensor, top_k: int) -> dict[str, Any]:
    """
    Split a matrix after its leading singular directions.

    Args:
        weight: (out, in)
        top_k: how many lead.

    Returns:
        `U_high`, `S_high`, `V_high`, the parameters `U_low`, `S_low`, `V_low`, and `rank_high`.

    Example:

        >>> import torch
        >>> parts = decompose_weight_matrix(torch.eye(4), top_k=1)
        >>> parts["U_low"].shape, parts["rank_high"]
        (torch.Size([4, 3]), 1)
    """
    high, low = split(weight.detach(), top_k)
    parts = {f"{name}_high": tensor.to(weight.dtype) for name, tensor in zip("USV", high, strict=True)}
    parts |= {f"{name}_low": nn.Parameter(tensor.to(weight.dtype)) for name, tensor in zip("USV", low, strict=True)}
    return {**parts, "rank_high": top_k}


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """
    Take what lies in the leading directions out of the gradients of the others, in place.

    Args:
        svd_dict: as `decompose_weight_matrix` gives it.
    """
    u, v = svd_dict["U_low"], svd_dict["V_low"]
    if u.grad is not None:
        u.grad.copy_(kept_apart(u.grad, svd_dict["U_high"], False))
    if v.grad is not None:
        v.grad.copy_(kept_apart(v.grad.mT, svd_dict["V_high"].mT, False).mT)
