# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Choosing entries by their magnitude, and starts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


uniform_ = partial(nn.init.kaiming_uniform_, a=5**0.5)  # as linear layers of torch start

Start = Callable[[torch.Tensor], Any]


def places_by_magnitude(weight: torch.Tensor, count: int, largest: bool) -> torch.Tensor:
    """
    Choose entries of a weight.

    Args:
        weight: (out, in).
        count: how many.
        largest: whether to choose those of largest magnitude; else those of smallest.

    Returns:
        Places, row after row, (count,), the most extreme one first.
    """
    return weight.abs().flatten().topk(count, largest=largest).indices.int()


def rounded(start: Start, dtype: torch.dtype) -> Start:
    """
    Give a start whose values have no more digits than a type has.

    Args:
        start: fills a tensor and gives it back.
        dtype: the type; values stay as they are if it is none of real numbers.
    """
    return lambda tensor: tensor.copy_(start(tensor).to(dtype if dtype.is_floating_point else tensor.dtype))


def after_layers(start: Start, *sizes: tuple[int, int]) -> Start:
    """
    Give a start before which numbers are drawn as by linear layers that are made, and thrown away.

    Args:
        start: fills a tensor.
        sizes: of the layers' weights.
    """

    def start_late(tensor: torch.Tensor) -> None:
        for size in sizes:
            uniform_(torch.empty(size))
        start(tensor)

    return start_late
