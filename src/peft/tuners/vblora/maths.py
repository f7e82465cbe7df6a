# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Pieces of factors as mixtures of vectors, and their logits in the short form of checkpoints."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...utils.error import PeftRuntimeError, PeftValueError


# Logit of a vector that is not mixed, where only the mixed ones were saved: it has no weight, and gets no gradient.
# It is a number, not minus infinity, so that such logits can be saved and loaded like others.
NOT_SAVED = -1e30


def mixtures(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """
    Mix the vectors of the greatest logits, by the softmax of these.

    Args:
        logits: (m, n, num_vectors).
        bank: (num_vectors, vector_length).
        topk: vectors that are mixed.

    Returns:
        (m, n, vector_length)
    """
    values, indices = logits.topk(topk, dim=-1)
    return (values.softmax(dim=-1).unsqueeze(-2) @ F.embedding(indices, bank)).squeeze(-2)


def check_trainable(adapter: str, logits: torch.Tensor) -> None:
    """
    Refuse logits that were read from the short form, which lacks those that training needs.

    Args:
        adapter: name of the adapter.
        logits: (m, n, num_vectors); all pieces are alike. Frozen ones can be anything.

    Raises:
        PeftRuntimeError: for such logits.
    """
    if logits.requires_grad and (logits[0, 0] <= NOT_SAVED).any():
        raise PeftRuntimeError(
            f"adapter {adapter!r} comes from a checkpoint with save_only_topk_weights=True, which lacks what training "
            "needs; train on from a checkpoint with all logits, or call eval()"
        )


class TopkForm(NamedTuple):
    """
    How logits are written as their top-k weights and indices; see `layers.saved_form.SavedForm`.

    Attributes:
        topk: vectors that are mixed.
        num_vectors: vectors in the bank.
        is_used: whether the config asks for this form.
    """

    topk: int
    num_vectors: int
    is_used: bool

    endings = ("_topk_weights", "_topk_indices")

    def write(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Keep what inference needs.

        Args:
            logits: (..., num_vectors).

        Returns:
            Weights (..., topk - 1), the last one being what is missing to 1, and indices (..., topk) in the smallest
            type of integer that can count the vectors.
        """
        values, indices = logits.topk(self.topk, dim=-1)
        return values.softmax(dim=-1)[..., :-1].contiguous(), indices.to(self.index_dtype)

    @property
    def index_dtype(self) -> torch.dtype:
        """The type of the indices."""
        sizes = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
        return next((dtype for dtype, size in sizes.items() if self.num_vectors < size), torch.int64)

    def read(self, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Make logits that give these weights.

        Args:
            weights: (..., k - 1).
            indices: (..., k), integers.

        Returns:
            (..., num_vectors); the logits of vectors that are not mixed are `NOT_SAVED`.

        Raises:
            PeftRuntimeError: if the two do not belong together.
            PeftValueError: if an index counts no vector.
        """
        counts = not (indices.is_floating_point() or indices.dtype == torch.bool)
        fits = indices.dim() and weights.dim() and indices.shape == (*weights.shape[:-1], weights.shape[-1] + 1)
        if not (weights.is_floating_point() and counts and fits):
            raise PeftRuntimeError(
                f"top-k weights ({weights.dtype}, {tuple(weights.shape)}) and indices ({indices.dtype}, "
                f"{tuple(indices.shape)}) do not belong together; there have to be floating point numbers, and one "
                "integer more than these. The file is damaged: save it again"
            )
        weights = weights.float() if weights.dtype.itemsize < 4 else weights
        indices = indices.long()
        if indices.numel() and not 0 <= indices.min() <= indices.max() < self.num_vectors:
            raise PeftValueError(
                f"the checkpoint mixes vectors {indices.min()} to {indices.max()} of a bank that has "
                f"{self.num_vectors}; its num_vectors is another, or the file is damaged"
            )
        last = 1 - weights.sum(dim=-1, keepdim=True)
        # rounding can leave less than nothing for the last one
        whole = torch.cat([weights, last], dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)
        logits = whole.new_full((*indices.shape[:-1], self.num_vectors), NOT_SAVED)
        return logits.scatter(-1, indices, whole.log())
