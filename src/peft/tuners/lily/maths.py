# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How the factors of Lily start."""

import math

import torch
from torch import nn


def draw_linear_(weight: torch.Tensor) -> None:
    """
    Draw a matrix as a linear layer does.

    Args:
        weight: (out, in), where it is written.
    """
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
