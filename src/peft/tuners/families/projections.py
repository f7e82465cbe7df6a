# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Random projections that all layers of an adapter share: they fit the largest layer, others use a corner."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..declared.tensors import Frozen, Kept, Shape, Tensors


def random_projections(targets: Mapping[str, Shape], c: Any, rows: int, columns: int) -> dict[str, Frozen]:
    """
    Tell the projections, which come from a seed, first A and then B.

    Args:
        targets: the layers.
        c: a config with `projection_prng_key` and `save_projection`.
        rows: of A, (rows, most inputs).
        columns: of B, (most outputs, columns).
    """
    outputs, inputs = (max(sizes) for sizes in zip(*targets.values(), strict=True))
    generator = torch.Generator().manual_seed(c.projection_prng_key)
    spec = Kept if c.save_projection else Frozen

    def projection(*shape: int) -> Frozen:
        bound = math.sqrt(6 / shape[1])  # products with a vector of unit variance have variance 2
        return spec(
            lambda: torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator),
            shape,
            rounded=True,
        )

    return {"A": projection(rows, inputs), "B": projection(outputs, columns)}


def corners(t: Tensors, shape: Shape, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Give the parts of A and B that belong to a layer, (rows, in) and (out, columns).

    Args:
        t: the tensors.
        shape: (out, in)
        like: a tensor of the layer's own, which tells type and device.
    """
    return t.A[:, : shape[1]].to(like), t.B[: shape[0]].to(like)
