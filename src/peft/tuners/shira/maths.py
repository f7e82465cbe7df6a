# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Choosing entries of a weight."""

from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import features


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
