# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
OLoRA: factors from a QR decomposition of the base weight.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, arXiv:2406.01775.
"""

import torch

from .base_weight import FromBaseWeight
from .registry import register_start


@register_start("olora")
class Olora(FromBaseWeight):
    """B has orthonormal columns, those of Q, and A the first rows of R."""

    def factorise(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Factorise a matrix by QR; the product is taken out of the weight as often as the adapter adds it."""
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
