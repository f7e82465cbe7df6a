# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Random projections that all layers of an adapter share: they fit the largest layer, others use a corner."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..declared.layers import DeclaredAdditive
from ..declared.tensors import Frozen, Kept, Shape, Tensors


class ProjectedLayer(DeclaredAdditive):
    """
    A layer that uses the beginning of tensors which fit the largest layer.

    Those of a checkpoint may be larger: the released package saves an adapter with the tensors of another one.

    Attributes:
        cut: attribute of such a tensor -> dimensions of which layers use the beginning.
    """

    cut: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make room for larger tensors."""
        for name, dimensions in self.cut.items():
            container = self._modules[name]
            if adapter_name not in container or not container.is_persistent(adapter_name):
                continue
            present = container[adapter_name]
            given = next((tensor.shape for key, tensor in tensors.items() if key.endswith(f".{name}")), present.shape)
            sizes = zip(given, present.shape, strict=False)
            fits = len(given) == present.dim() and all(
                size >= own if dimension in dimensions else size == own for dimension, (size, own) in enumerate(sizes)
            )
            if fits and given != present.shape:
                container[adapter_name] = present.new_empty(given)


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
