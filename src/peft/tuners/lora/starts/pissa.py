# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
PiSSA: factors from the principal singular vectors of the base weight.

Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", 2024,
arXiv:2404.02948.
"""

import re

import torch

from ....utils.error import PeftValueError
from ..maths import leading_singular_vectors
from .base_weight import FromBaseWeight
from .registry import register_start


# a subspace has long been found by then
_MOST_ITERATIONS = 1_000


@register_start("pissa")
class Pissa(FromBaseWeight):
    """
    scaling * B A is the best approximation of the base weight of that rank.

    Args:
        name: "pissa" or "pissa_niter_N".
        iterations: if given, use a randomised decomposition with so many subspace iterations.
    """

    family = "'pissa_niter_N' with a number N"

    def __init__(self, name: bool | str, iterations: int | None = None) -> None:
        super().__init__(name)
        self.iterations = iterations

    @classmethod
    def from_name(cls, name: str) -> "Pissa | None":
        """
        Read the number of iterations from `pissa_niter_16` and the like.

        Raises:
            PeftValueError: if it is absurd.
        """
        found = re.fullmatch(r"pissa_niter_(\d+)", name)
        if found is None:
            return None
        iterations = int(found[1])
        if iterations > _MOST_ITERATIONS:
            raise PeftValueError(
                f"init_lora_weights={name!r} asks for {iterations:,d} iterations; a few are enough, and at most "
                f"{_MOST_ITERATIONS} are done"
            )
        return cls(name, iterations)

    def factorise(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Factorise the principal part of a matrix."""
        u, s, vh = (
            torch.linalg.svd(weight, full_matrices=False)
            if self.iterations is None
            else leading_singular_vectors(weight, rank, self.iterations)
        )
        root = (s[:rank] / scaling).sqrt()
        return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
