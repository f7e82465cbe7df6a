# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The principal subspace of a matrix, and what turns it."""

import torch
from torch import nn

from ..families.rotations import cayley, cayley_neumann, full_precision


def principal_factors(
    weight: torch.Tensor, r: int, scaling: float, in_both: bool, rounds: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Write the leading singular directions of a matrix as a product, divided by a scaling.

    Args:
        weight: (out, in)
        r: how many.
        scaling: what the product is going to be multiplied by.
        in_both: whether both factors hold the singular values, and not the first one alone.
        rounds: of a randomised decomposition; None for an exact one.
        seed: for the former; the state of the global generator stays.

    Returns:
        B (out, r) and A (r, in), in float32.
    """
    weight = weight.float()
    if rounds is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, q=r, niter=rounds)
        vh = v.T
    u, s, vh = u[:, :r], s[:r] / scaling, vh[:r]
    if in_both:
        return (u * s.sqrt()).contiguous(), (s.sqrt()[:, None] * vh).contiguous()
    return u * s, vh.contiguous()


class OrthLayer(nn.Module):
    """
    What turns and stretches rows of r numbers.

    Args:
        size: r.
        orth: whether it turns, or is any matrix.
        mag_b: whether results are stretched.
        mag_a: whether inputs are.
        use_cayley_neumann: sum a series for the rotation.
        num_cayley_neumann_terms: terms of the series.
        cayley_neumann_eps: greatest norm of what the series is of; None for any.

    Example:

        >>> import torch
        >>> layer = OrthLayer(3)
        >>> layer.reset_parameters()
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        size: int,
        orth: bool = True,
        mag_b: bool = True,
        mag_a: bool = True,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        cayley_neumann_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.size, self.orth = size, orth
        self.use_cayley_neumann, self.terms, self.eps = (
            use_cayley_neumann,
            num_cayley_neumann_terms,
            cayley_neumann_eps,
        )
        self.weight = nn.Parameter(torch.empty((size * (size - 1) // 2,) if orth else (size, size)))
        self.vector_b = nn.Parameter(torch.empty(size)) if mag_b else None
        self.vector_a = nn.Parameter(torch.empty(size)) if mag_a else None
        if orth:
            rows, cols = torch.triu_indices(size, size, 1)
            self.register_buffer("rows", rows, persistent=False)
            self.register_buffer("cols", cols, persistent=False)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """
        Start anew.

        Args:
            init_weights: True for no turn, False for a random one.
        """
        self.weight.zero_() if init_weights else self.weight.normal_(std=0.1)
        if not self.orth:
            self.weight.add_(torch.eye(self.size, dtype=self.weight.dtype, device=self.weight.device))
        for vector in (self.vector_b, self.vector_a):
            if vector is not None:
                vector.fill_(1.0)

    def get_matrix(self) -> torch.Tensor:
        """Compute the matrix that columns are multiplied by, (r, r)."""
        matrix = self._rotation() if self.orth else full_precision(self.weight)
        matrix = matrix if self.vector_b is None else self.vector_b[:, None] * matrix
        return matrix if self.vector_a is None else matrix * self.vector_a

    def _rotation(self) -> torch.Tensor:
        entries = full_precision(self.weight)
        upper = entries.new_zeros(self.size, self.size).index_put((self.rows, self.cols), entries)
        skew = upper - upper.T
        if not self.use_cayley_neumann:
            return cayley(-skew)
        if self.eps is not None:
            norm = skew.norm()
            skew = torch.where(norm > self.eps, skew * (self.eps / (norm + 1e-12)), skew)
        return cayley_neumann(skew[None], self.terms)[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """
        Turn and stretch rows.

        Args:
            input: (..., r)
        """
        return input.to(self.weight.dtype) @ self.get_matrix().T.to(self.weight.dtype)
