# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a method declares of an adapter, so that its layer can be computed as one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class LowRank:
    """
    An adapter that adds `scaling * up(down(dropout(x)))` to the output of a linear layer.

    Args:
        adapter: its name.
        down: adapter name -> the factor that meets the input; weight (r, in), no bias.
        up: the same for the one that gives the output; weight (out, r), and maybe a bias, which is scaled as well.
        dropout: the same for what drops inputs: `nn.Dropout` or `nn.Identity`.
        scaling: adapter name -> number; it is looked up at each call.
        strategies: adapter name -> what computes it, if not the factors alone; looked up at each call.
        strategy: what stands there for this adapter. If that changes, what is declared here does not hold any more.
        magnitude: adapter name -> module whose `weight`, (out,), takes the place of the norms of base weight plus
            delta; None where that is nothing but added.
        norm: gives these norms, (out,), which are constants for autograd.
    """

    adapter: str
    down: nn.ModuleDict
    up: nn.ModuleDict
    dropout: nn.ModuleDict
    scaling: Mapping[str, float]
    strategies: Mapping[str, Any] = field(default_factory=dict)
    strategy: Any = None
    magnitude: nn.ModuleDict | None = None
    norm: Callable[[], torch.Tensor] | None = None
