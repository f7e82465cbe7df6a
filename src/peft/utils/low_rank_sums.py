# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
One product of two factors in the place of a weighted sum of such products: functions of tensors, without a model.

Factors are batches of matrices, B (groups, out, r) and A (groups, r, in). There are three kinds of combinations:

- "cat" puts factors side by side, which is the weighted sum exactly, in the sum of the ranks;
- "svd" is the best approximation of that sum in a given rank. It is found from QR decompositions of the factors: the
  sum itself, a matrix of the size of the weight, is never built. With "ties_svd" and its like the sum is no product of
  factors, and has to be;
- the others combine the factors, entry by entry, B with B and A with A.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from . import merge_utils
from .error import PeftValueError


# functions of task tensors, their weights and options; those named in _SPARSE need a density
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": merge_utils.task_arithmetic,
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
_SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = ("svd", "cat", *_FUNCTIONS, *(f"{name}_svd" for name in _SPARSE))


class Factors(NamedTuple):
    """
    What a layer adds to its weight: B A, as batches of matrices.

    Attributes:
        b: (groups, out, r).
        a: (groups, r, in).
    """

    b: torch.Tensor
    a: torch.Tensor


class Part(NamedTuple):
    """
    One adapter of a layer, with what it is multiplied by.

    Attributes:
        factors: without the scaling.
        scaling: the adapter's.
        weight: in the sum.
        bias: (out,), that of factor B, or None.
    """

    factors: Factors
    scaling: float
    weight: float
    bias: torch.Tensor | None

    @property
    def coefficient(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.weight * self.scaling


@dataclass(frozen=True)
class Combination:
    """
    How to combine.

    Attributes:
        kind: one of `COMBINATION_TYPES`.
        svd_rank: rank to approximate in; the greatest of the adapters' if left out.
        svd_clamp: if given, a quantile of the resulting entries beyond which they are cut off.
        svd_driver: method that the GPU library uses for decompositions.
        density: share of the entries to keep.
        majority_sign_method: "total" or "frequency".
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def check(self) -> None:
        """
        Refuse options that cannot work.

        Raises:
            PeftValueError: in that case.
        """
        if self.kind not in COMBINATION_TYPES:
            raise PeftValueError(
                f"combination_type={self.kind!r} is not known; choose one of {', '.join(COMBINATION_TYPES)}"
            )
        if self.kind.removesuffix("_svd") in _SPARSE:
            merge_utils.check_density(self.density)
            if "ties" in self.kind:
                merge_utils.check_sign_method(self.majority_sign_method)
        if self.svd_rank is not None and (not isinstance(self.svd_rank, int) or self.svd_rank <= 0):
            raise PeftValueError(f"svd_rank must be a positive integer, found {self.svd_rank!r}")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise PeftValueError(f"svd_clamp must be a quantile, from 0 to 1, found {self.svd_clamp!r}")

    def rank_of(self, ranks: Sequence[int]) -> int:
        """
        Give the rank of the result.

        Args:
            ranks: those of the adapters that a layer has.

        Raises:
            PeftValueError: if their factors cannot be combined entry by entry.
        """
        if self.kind == "cat":
            return sum(ranks)
        if self.kind.endswith("svd"):
            return self.svd_rank or max(ranks)
        if len(set(ranks)) > 1:
            raise PeftValueError(
                f"combination_type={self.kind!r} combines factors entry by entry and needs adapters of one rank, "
                f"found {', '.join(map(str, ranks))}; use 'svd' or 'cat'"
            )
        return ranks[0]

    def function(self) -> Callable[..., torch.Tensor]:
        """Give the function of tensors and weights that the kind is about, with its options filled in."""
        name = self.kind.removesuffix("_svd")
        options: dict[str, Any] = {"density": self.density} if name in _SPARSE else {}
        if "ties" in name:
            options["majority_sign_method"] = self.majority_sign_method
        return partial(_FUNCTIONS[name], **options)

    def factors(self, parts: Sequence[Part], rank: int) -> Factors:
        """
        Combine what the adapters of one layer add to its weight.

        Args:
            parts: the adapters.
            rank: rank of the result, per group.
        """
        if self.kind == "cat":
            return _side_by_side(parts)
        if self.kind.endswith("svd"):
            return self._approximation(parts, rank)
        coefficients = parts[0].factors.b.new_tensor([part.coefficient for part in parts])
        roots = coefficients.abs().sqrt()  # each of the two factors gets a half, and A the sign
        function = self.function()
        a = function([part.factors.a for part in parts], roots * coefficients.sign())  # first, as the release draws
        return Factors(function([part.factors.b for part in parts], roots), a)

    def _approximation(self, parts: Sequence[Part], rank: int) -> Factors:
        """Find the best approximation of the combined deltas."""
        if self.kind == "svd":
            product = _side_by_side(parts)
            if self.svd_clamp is None:
                return _best_of_product(product, rank, self.svd_driver)
            # the quantile depends on the signs of the singular vectors, which are those of the whole matrix
            combined = product.b @ product.a
        else:
            deltas = [part.factors.b @ part.factors.a * part.scaling for part in parts]
            combined = self.function()(deltas, deltas[0].new_tensor([part.weight for part in parts]))
        return self._clamped(_best_of_matrix(combined, rank, self.svd_driver))

    def _clamped(self, factors: Factors) -> Factors:
        if self.svd_clamp is None:
            return factors
        bound = _quantile(torch.cat([factors.b.flatten(), factors.a.flatten()]), self.svd_clamp)
        return Factors(factors.b.clamp(-bound, bound), factors.a.clamp(-bound, bound))


def _side_by_side(parts: Sequence[Part]) -> Factors:
    """Give factors of the weighted sum; the weights go to A, which is the smaller one as a rule."""
    return Factors(
        torch.cat([part.factors.b for part in parts], dim=-1),
        torch.cat([part.factors.a * part.coefficient for part in parts], dim=-2),
    )


def _best_of_product(factors: Factors, rank: int, driver: str | None) -> Factors:
    """Approximate a product in a lower rank: with B = Q R and A^T = Q' R', only R R'^T has to be decomposed."""
    q_left, r_left = torch.linalg.qr(factors.b)
    q_right, r_right = torch.linalg.qr(factors.a.mT)
    core = _best_of_matrix(r_left @ r_right.mT, rank, driver)
    return Factors(q_left @ core.b, core.a @ q_right.mT)


def _best_of_matrix(matrix: torch.Tensor, rank: int, driver: str | None) -> Factors:
    """Approximate a matrix in a lower rank; singular values go to B."""
    options = {"driver": driver} if matrix.is_cuda else {}
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, **options)
    missing = max(0, rank - s.shape[-1])  # a small matrix may have less than the rank that is asked for
    b, a = u[..., :rank] * s[..., None, :rank], vh[..., :rank, :]
    return Factors(torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing)))


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """Interpolate between order statistics; torch's own function refuses large tensors."""
    position = q * (values.numel() - 1)
    below = int(position)
    lower = values.kthvalue(below + 1).values
    upper = values.kthvalue(min(below + 2, values.numel())).values
    return torch.lerp(lower, upper, position - below)
