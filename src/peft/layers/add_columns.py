# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adding to some columns of a tensor without a copy of it, or of its gradient."""

from typing import Any

import torch

from ..utils.own_derivative import OwnDerivative


class AddColumns(OwnDerivative):
    """
    Add to some columns of a tensor that nobody else looks at, in its own memory.

    An in-place operation would do, were it not that the output of a linear layer is a view to autograd, for which the
    gradient would be copied twice.
    """

    @staticmethod
    def forward(result: torch.Tensor, columns: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Add `columns` (..., n) to the columns `indices` (n,) of `result` (..., width)."""
        return result.detach().index_add_(-1, indices, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep the places of the columns."""
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Pass the gradient on, and pick its columns."""
        (indices,) = ctx.saved_tensors
        return gradient, gradient.index_select(-1, indices), None

    @staticmethod
    def jvp(ctx: Any, result: torch.Tensor, columns: torch.Tensor, indices: None) -> torch.Tensor:
        """Add the tangents likewise."""
        return result.index_add(-1, ctx.saved_tensors[0], columns)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, int | None, None],
        result: torch.Tensor,
        columns: torch.Tensor,
        indices: torch.Tensor,
    ) -> tuple[torch.Tensor, int]:
        """Compute a batch of such sums; the memory of one result would not hold them."""
        batches = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((result, columns), in_dims, strict=False)
        )
        result, columns = batches
        return result.index_add(-1, indices, columns), 0
