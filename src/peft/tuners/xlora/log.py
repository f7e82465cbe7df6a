# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The weights that X-LoRA has given its experts."""

from dataclasses import dataclass, field

import torch


@dataclass
class ScalingsLog:
    """
    Weights of calls, (batch, length, layers, experts), in the order of the calls.

    Attributes:
        latest: those of the latest call; None before the first one.
        is_kept: whether those of each call are kept.
        kept: what was kept.
    """

    latest: torch.Tensor | None = None
    is_kept: bool = False
    kept: list[torch.Tensor] = field(default_factory=list)

    def note(self, weights: torch.Tensor) -> None:
        """
        Note the weights of a call.

        Args:
            weights: (batch, length, layers, experts); gradients are not kept.
        """
        self.latest = weights.detach()
        if self.is_kept:
            self.kept.append(self.latest)

    def by_length(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """Sort what was kept by the length of the sequences: length -> (positions, weights)."""
        found: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for position, weights in enumerate(self.kept):
            positions, tensors = found.setdefault(weights.shape[1], ([], []))
            positions.append(position)
            tensors.append(weights)
        return found
