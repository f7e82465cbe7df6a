# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a method declares of an adapter, so that its layer can be computed as one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

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
        otherwise: names of adapters that something else is made of; while this one is among them, nothing is declared.
    """

    adapter: str
    down: nn.ModuleDict
    up: nn.ModuleDict
    dropout: nn.ModuleDict
    scaling: Mapping[str, float]
    otherwise: Collection[str] = ()

    @property
    def containers(self) -> tuple[nn.ModuleDict, nn.ModuleDict, nn.ModuleDict]:
        """Give what holds the modules."""
        return self.down, self.up, self.dropout
