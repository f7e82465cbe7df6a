# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The models that cases are measured on."""

import torch
import torch.nn.functional as F
from torch import nn


class Pair(nn.Module):
    """
    Two Linear layers, one after the other.

    Args:
        width: features of both.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute both."""
        return self.value(self.query(x))


def many_linears(count: int, width: int = 4) -> nn.Module:
    """
    Make a model of square Linear layers.

    Args:
        count: how many, an even number.
        width: features of each.
    """
    return nn.Sequential(*(Pair(width) for _ in range(count // 2)))


def names_of_linears(model: nn.Module) -> list[str]:
    """List the full names of a model's Linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def make_effective(model: nn.Module) -> None:
    """Set LoRA's second factors, which start at zero, to something else."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


class HandWrittenLora(nn.Module):
    """
    LoRA on a Linear layer as one would write it for one adapter and one purpose.

    Args:
        base: the layer, which is frozen.
        r: rank.
        alpha: numerator of the scaling.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, r) * 0.01)
        self.scaling = alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W x + scaling * B A x, scaled on the side of r features, where it costs least."""
        return self.base(x) + F.linear(F.linear(x, self.a) * self.scaling, self.b)
