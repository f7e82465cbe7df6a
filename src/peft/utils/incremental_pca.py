# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Principal components of rows that come in batches, with the interface of scikit-learn's class of that name."""

from collections.abc import Iterator

import torch

from .error import PeftValueError
from .seeding import seeded


class IncrementalPCA:
    """
    Principal components of rows that come in batches; memory does not grow with their number.

    Each batch is decomposed together with what is known of those before: the components, scaled by their singular
    values, and one row for the shift of the mean (Ross, Lim, Lin, Yang 2008, "Incremental Learning for Robust Visual
    Tracking"). Means and variances are held in float64, and decompositions are computed in the type of the rows.

    Args:
        n_components: how many to keep; as many as rows and features allow if None.
        copy: whether to leave the rows of the caller as they are.
        batch_size: rows per step of `fit`; five times the number of features if None.
        svd_driver: method that the GPU library uses for a full decomposition.
        lowrank: whether to compute the leading components only, by a randomised decomposition.
        lowrank_q: how many directions that one looks at; twice `n_components` if None.
        lowrank_niter: its subspace iterations.
        lowrank_seed: seed of its random numbers; the caller's generator is left alone if given.

    Attributes:
        components_: (n_components, features), the entry of largest absolute value of each row positive.
        singular_values_: (n_components,), of all rows less their mean.
        mean_: (features,)
        var_: (features,), without correction for the mean.
        explained_variance_: (n_components,)
        explained_variance_ratio_: the same as shares of the whole variance.
        noise_variance_: mean of the variances along directions that were found and not kept.
        n_samples_seen_: how many rows there were.

    Raises:
        PeftValueError: for numbers that cannot work.

    Example:

        >>> import torch
        >>> from peft.utils.incremental_pca import IncrementalPCA
        >>> rows = torch.arange(12.0).outer(torch.tensor([3.0, 4.0]))
        >>> IncrementalPCA(n_components=1, batch_size=4).fit(rows).components_
        tensor([[0.6000, 0.8000]])
    """

    components_: torch.Tensor
    singular_values_: torch.Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if n_components is not None and n_components < 1:
            raise PeftValueError(f"n_components must be positive, found {n_components}")
        if lowrank:
            if n_components is None:
                raise PeftValueError("lowrank=True needs n_components: how many components to compute")
            lowrank_q = 2 * n_components if lowrank_q is None else lowrank_q
            if lowrank_q < n_components:
                raise PeftValueError(
                    f"lowrank_q must not be smaller than n_components={n_components}, found {lowrank_q}"
                )
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver = svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_samples_seen_ = 0
        self.mean_ = self.var_ = None

    # -------------------------------------------------------------------------------------------------------- fitting
    def fit(self, X: torch.Tensor, check_input: bool = True) -> "IncrementalPCA":  # noqa: N803
        """
        Find the components of rows, in batches.

        Args:
            X: (rows, features)
            check_input: False to trust them.

        Returns:
            This object.

        Raises:
            PeftValueError: for rows that cannot be used.
        """
        if check_input:
            X = self._checked(X)  # noqa: N806
        rows, features = X.shape
        size = 5 * features if self.batch_size is None else self.batch_size
        for batch in self.gen_batches(rows, size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    def partial_fit(self, X: torch.Tensor, check_input: bool = True) -> "IncrementalPCA":  # noqa: N803
        """
        Take a batch of rows in.

        Args:
            X: (rows, features)
            check_input: False to trust them.

        Returns:
            This object.

        Raises:
            PeftValueError: for rows that cannot be used, or too few of them for `n_components`.
        """
        if check_input:
            X = self._checked(X)  # noqa: N806
        rows, features = X.shape
        kept = self._components_for(rows, features)
        mean, var, batch_mean = self._moments_with(X)
        matrix = X - batch_mean.to(X.dtype) if self.copy else X.sub_(batch_mean.to(X.dtype))
        if self.n_samples_seen_:
            weight = (self.n_samples_seen_ / (self.n_samples_seen_ + rows) * rows) ** 0.5
            shift = weight * (self.mean_ - batch_mean)
            known = self.singular_values_.unsqueeze(1) * self.components_
            matrix = torch.cat([known.to(matrix), matrix, shift.to(matrix).unsqueeze(0)])
        s, vh = self._decompose(matrix)
        total = self.n_samples_seen_ + rows
        vh = vh * vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
        squares, whole = s.double().square(), var.sum() * total
        variance = squares / max(total - 1, 1)
        is_all = kept in (rows, features) or kept == len(s)
        self.noise_variance_ = variance.new_zeros(()) if is_all else variance[kept:].mean()
        self.n_samples_seen_, self.mean_, self.var_ = total, mean, var
        self.singular_values_, self.components_ = s[:kept], vh[:kept]
        self.explained_variance_ = variance[:kept]
        self.explained_variance_ratio_ = squares[:kept] / whole
        self.n_components_ = kept
        return self

    def _decompose(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give singular values and right singular vectors, as rows."""
        if not self.lowrank:
            _, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=self.svd_driver)
            return s, vh
        with seeded(self.lowrank_seed, matrix.device):
            _, s, v = torch.svd_lowrank(matrix, q=min(self.lowrank_q, *matrix.shape), niter=self.lowrank_niter)
        return s, v.T

    def _moments_with(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give mean and variance of all rows with new ones, and the mean of the new ones, in float64."""
        var, mean = (found.double() for found in torch.var_mean(rows, dim=0, correction=0))
        if not self.n_samples_seen_:
            return mean, var, mean
        before, new = self.n_samples_seen_, len(rows)
        total = before + new
        squares = before * self.var_ + new * var + before * new / total * (self.mean_ - mean).square()
        return (before * self.mean_ + new * mean) / total, squares / total, mean

    # ------------------------------------------------------------------------------------------------------- checking
    def _checked(self, rows: torch.Tensor) -> torch.Tensor:
        if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or not rows.numel():
            found = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise PeftValueError(f"rows must be a tensor (rows, features) that is not empty, found {found}")
        if not rows.is_floating_point():
            rows = rows.float()
        if not rows.isfinite().all():
            raise PeftValueError("rows hold nan or infinite entries, which have no principal components")
        return rows

    def _components_for(self, rows: int, features: int) -> int:
        """Say how many components to keep after a batch; refuse one that does not fit."""
        if self.n_samples_seen_:
            if features != self.components_.shape[1]:
                raise PeftValueError(
                    f"rows have {features} features, and those before had {self.components_.shape[1]}; use another "
                    "IncrementalPCA for them"
                )
            return len(self.components_)
        if self.n_components is None:
            return min(rows, features)
        if self.n_components > min(rows, features):
            raise PeftValueError(
                f"{self.n_components} components need as many rows and features, found {rows} rows of {features} "
                "features; use fewer components, or larger batches"
            )
        return self.n_components

    # ---------------------------------------------------------------------------------------------------------- using
    def transform(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """
        Express rows by the components.

        Args:
            X: (rows, features)

        Returns:
            (rows, n_components)
        """
        components = self.components_.to(self.mean_.dtype)
        return (X.to(self.mean_) - self.mean_) @ components.T

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """
        Split a number of rows into batches.

        Args:
            n: the number.
            batch_size: rows per batch.
            min_batch_size: least that may be left for the last one; what is less goes with the one before.

        Yields:
            Slices of one after the other.
        """
        start = 0
        while start < n:
            end = start + batch_size
            if n - end < max(min_batch_size, 1):
                end = n
            yield slice(start, end)
            start = end
