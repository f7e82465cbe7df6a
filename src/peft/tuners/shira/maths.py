# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Choosing entries of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import features
from ...utils.error import PeftValueError


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> torch.Tensor:
    """
    Choose entries of a weight at random.

    Args:
        base_layer: a linear layer; its weight is (out, in).
        r: r * (in + out) entries are chosen.
        random_seed: seed of the choice; a fixed one if left out.
        kwargs: not used; what other functions of this kind may be given.

    Returns:
        A tensor of booleans, (out, in).

    Example:

        >>> from torch import nn
        >>> from peft.tuners.shira.mask_functions import random_mask
        >>> int(random_mask(nn.Linear(6, 4), r=2).sum())
        20
    """
    inputs, out = features(base_layer)
    generator = torch.Generator()
    if random_seed is not None:
        generator.manual_seed(random_seed)
    mask = torch.zeros(out * inputs, dtype=torch.bool)
    mask[torch.randperm(out * inputs, generator=generator)[: r * (inputs + out)]] = True
    return mask.view(out, inputs)


def places(choose: Callable[[nn.Module, int], torch.Tensor], base_layer: nn.Module, r: int) -> torch.Tensor:
    """
    Give the rows and columns of the entries that a function chooses, (2, r * (in + out)).

    Args:
        choose: gives a mask, as `random_mask` does.
        base_layer: a linear layer.
        r: for the function.

    Raises:
        PeftValueError: if it chooses another number of entries.
    """
    chosen, count = choose(base_layer, r).nonzero().T, r * sum(features(base_layer))
    if chosen.shape != (2, count):
        raise PeftValueError(f"a mask must have {count} ones, found {chosen.shape[1]}")
    return chosen.int()
