# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Combining what several adapters have learned: functions of tensors, without a model.

A *task tensor* is one adapter's tensor for one place of the model. All tensors of a call have one shape, and each has
a weight. Tensors are added one by one; they are stacked only where their entries are compared.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from .error import PeftRuntimeError, PeftTypeError, PeftValueError
from .warning import warn


class DensityError(PeftValueError, PeftTypeError):
    """A density that is missing or cannot be one."""


class UnknownSignMethodError(PeftValueError, PeftRuntimeError):
    """A way to find the sign of the majority that does not exist."""


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Give weights the shape in which they multiply stacked tensors.

    Args:
        task_tensors: (count, ...).
        weights: (count,).

    Returns:
        (count, 1, ...), with as many dimensions as `task_tensors`.

    Example:

        >>> import torch
        >>> from peft.utils.merge_utils import reshape_weight_task_tensors
        >>> reshape_weight_task_tensors(torch.zeros(2, 3, 4), torch.tensor([0.5, 0.5])).shape
        torch.Size([2, 1, 1])
    """
    return weights.reshape(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


# ------------------------------------------------------------------------------------------ pruning
def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """
    Keep the entries of largest magnitude and set the others to zero.

    Args:
        tensor: any shape.
        density: share of the entries to keep; their number is rounded down.

    Example:

        >>> import torch
        >>> from peft.utils.merge_utils import magnitude_based_pruning
        >>> magnitude_based_pruning(torch.tensor([1.0, -4.0, 3.0, 0.5]), density=0.5)
        tensor([ 0., -4.,  3.,  0.])
    """
    kept = int(density * tensor.numel())
    largest = tensor.abs().reshape(-1).topk(kept, sorted=False).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[largest] = True
    return tensor * mask.reshape(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """
    Keep each entry with a certain probability: DARE (Yu et al. 2023, arXiv:2311.03099).

    Args:
        tensor: any shape.
        density: probability of keeping an entry.
        rescale: divide what is kept by the density, so that the expectation stays what the tensor was.
    """
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale and density > 0 else kept


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """
    Set entries of a tensor to zero.

    Args:
        tensor: any shape.
        density: share of the entries to keep. From 1 on, all are kept, with a warning beyond 1.
        method: "magnitude" keeps the largest entries, "random" any.
        rescale: for "random": divide what is kept by the density.

    Raises:
        PeftValueError: if the density is negative or the method unknown.
        PeftTypeError: if the density is not a number.

    Example:

        >>> import torch
        >>> from peft.utils.merge_utils import prune
        >>> prune(torch.tensor([1.0, -2.0]), 0.5, method="magnitude")
        tensor([ 0., -2.])
    """
    check_density(density)
    if density >= 1:
        if density > 1:
            warn(f"density={density} is more than all entries; nothing is set to zero")
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise PeftValueError(f"method={method!r} is not known; choose 'magnitude' or 'random'")


def check_density(density: float | None) -> None:
    """
    Refuse what cannot be a share of entries.

    Raises:
        PeftValueError, PeftTypeError: if it is missing, no number, or negative.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not density >= 0:
        raise DensityError(f"density must be the share of entries to keep, from 0 to 1; found {density!r}")


# ------------------------------------------------------------------------------------------ signs
def calculate_majority_sign_mask(
    tensor: torch.Tensor, method: Literal["total", "frequency"] = "total"
) -> torch.Tensor:
    """
    Find out, entry by entry, which tensors have the sign of the majority (TIES, Yadav et al. 2023, arXiv:2306.01708).

    Args:
        tensor: (count, ...), stacked task tensors.
        method: "total": the sign of the sum; "frequency": the sign that is more frequent. A draw counts as positive.

    Returns:
        A mask of the shape of `tensor`.

    Raises:
        PeftValueError: if the method is unknown.
    """
    check_sign_method(method)
    sign = tensor.sign()
    votes = tensor.sum(dim=0) if method == "total" else sign.sum(dim=0)
    majority = torch.where(votes >= 0, 1, -1)
    return sign == majority


def check_sign_method(method: str) -> None:
    """
    Refuse an unknown way to find the sign of the majority.

    Raises:
        PeftValueError: in that case.
    """
    if method not in ("total", "frequency"):
        raise UnknownSignMethodError(f"majority_sign_method={method!r} is not known; choose 'total' or 'frequency'")


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """
    Take the mean over those tensors that agree with the majority, entry by entry.

    Args:
        task_tensors: (count, ...).
        majority_sign_mask: the same shape, from `calculate_majority_sign_mask`.

    Returns:
        One tensor; zero where none agrees.
    """
    total = (task_tensors * majority_sign_mask).sum(dim=0)
    return total / majority_sign_mask.sum(dim=0).clamp(min=1)


# ------------------------------------------------------------------------------------------ combining
def _weighted(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    return [tensor * weight for tensor, weight in zip(task_tensors, weights, strict=True)]


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def task_arithmetic(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """
    Add tensors, each times its weight (Ilharco et al. 2022, arXiv:2212.04089).

    Args:
        task_tensors: tensors of one shape.
        weights: (count,).

    Example:

        >>> import torch
        >>> from peft.utils.merge_utils import task_arithmetic
        >>> task_arithmetic([torch.ones(2), torch.ones(2)], torch.tensor([0.5, -2.0]))
        tensor([-1.5000, -1.5000])
    """
    return _sum(_weighted(task_tensors, weights))


def magnitude_prune(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """
    Keep each tensor's entries of largest magnitude, and add them, each times its weight.

    Args:
        task_tensors: tensors of one shape.
        weights: (count,).
        density: share of the entries of each tensor to keep.
    """
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """
    Keep entries of each tensor at random, rescale them, and add them, each times its weight (arXiv:2311.03099).

    Args:
        task_tensors: tensors of one shape.
        weights: (count,).
        density: probability of keeping an entry.
    """
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """
    Keep the largest entries, and of those the mean over tensors with the majority's sign (arXiv:2306.01708).

    Args:
        task_tensors: tensors of one shape.
        weights: (count,); they multiply what is kept after its signs were compared.
        density: share of the entries of each tensor to keep.
        majority_sign_method: "total" or "frequency"; see `calculate_majority_sign_mask`.

    Example:

        >>> import torch
        >>> from peft.utils.merge_utils import ties
        >>> ties([torch.tensor([4.0, 1.0]), torch.tensor([-1.0, 3.0])], torch.ones(2), density=1.0)
        tensor([4., 2.])
    """
    kept = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _merge_by_sign(kept, weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """
    Keep entries at random, and of those the mean over tensors with the majority's sign.

    Args:
        task_tensors: tensors of one shape.
        weights: (count,); they multiply what is kept after its signs were compared.
        density: probability of keeping an entry.
        majority_sign_method: "total" or "frequency"; see `calculate_majority_sign_mask`.
    """
    kept = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _merge_by_sign(kept, weights, majority_sign_method)


def _merge_by_sign(kept: Sequence[torch.Tensor], weights: torch.Tensor, method: str) -> torch.Tensor:
    stacked = torch.stack(tuple(kept))
    mask = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
