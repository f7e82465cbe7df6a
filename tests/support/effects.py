# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How far tensors are moved so that they matter, and how far rounding may move results, for any method."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from support.helpers import seeded


# what a test wants an adapter to do to the outputs, relative to them
CHANGE = 0.1
# roundings of the type that weights are kept in: the weight, what is added to it, their sum, and the output twice
ROUNDINGS = 5
# and those of a computation itself, in float32 whatever the type of the weights: sums, products, inverses
COMPUTING = 160


def rounding(dtype: torch.dtype, changes: int = 1) -> float:
    """
    How far two ways to one result may be apart, relative to the greatest entry.

    Args:
        dtype: of the weights.
        changes: how often a weight was changed and rounded on the way.
    """
    return (ROUNDINGS * changes * torch.finfo(dtype).eps + COMPUTING * torch.finfo(torch.float32).eps) / 2


def add_noise(parameters: Iterable[nn.Parameter], size: float, seed: int) -> None:
    """Add normally distributed noise of a size to parameters, behind the back of autograd."""
    with seeded(seed):
        for parameter in parameters:
            parameter.data.add_((torch.randn(parameter.shape) * size).to(parameter.dtype))


def size_that_matters(
    parameters: Iterable[nn.Parameter], run: Callable[[], torch.Tensor], seed: int = 2, wanted: float = CHANGE
) -> float:
    """
    Find the size of the noise on parameters that changes what is computed by about as much as is wanted.

    Args:
        parameters: those of an adapter; they are left as they were.
        run: computes with them.
        seed: of the noise.
        wanted: change of what is computed, relative to it.
    """
    parameters = list(parameters)
    starts = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def output() -> torch.Tensor:
        return run().double()

    before = output()

    def change(size: float) -> float:
        add_noise(parameters, size, seed)
        after = output()
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.data.copy_(start)
        return float((after - before).norm() / before.norm())

    low, size, high = 0.0, CHANGE, float("inf")
    for _ in range(24):
        found = change(size)
        if wanted / 1.5 <= found <= wanted * 1.5:
            break
        low, high = (size, high) if found < wanted else (low, size)
        size = 2 * size if high == float("inf") else size / 2 if low == 0.0 else (low * high) ** 0.5
    else:
        raise AssertionError(f"noise of size {size:.2g} changes what is computed by {found:.2g}, not by {wanted}")
    return size


def move(
    parameters: Iterable[nn.Parameter], run: Callable[[], torch.Tensor], seed: int = 2, wanted: float = CHANGE
) -> None:
    """Move parameters so far that what is computed with them changes by about as much as is wanted."""
    parameters = list(parameters)
    add_noise(parameters, size_that_matters(parameters, run, seed, wanted), seed)
