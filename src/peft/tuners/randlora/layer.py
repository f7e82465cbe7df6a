# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RandLoRA: W + a sum of many products of random bases, which all layers share; what is trained scales them."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...configs.checks import check_counts
from ...utils.constants import TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained
from ..families.projections import ProjectedLayer
from .config import RandLoraConfig
from .maths import UniqueBaseGrad, random_basis, sparse_basis


class BasesLayer(ProjectedLayer):
    """A layer that tells its scaled bases."""

    cut = {"randlora_A": (2,), "randlora_B": (0, 1)}

    def get_scaled_bases(self, adapter: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give the factors of the update.

        Args:
            adapter: name.
            device: where they are wanted; where the layer is if None.

        Returns:
            First (n r, in) and second (out, n r); the update is second @ first.
        """
        second, first = RandLora.low_rank(self.tensors(adapter), self.shape, self.settings[adapter])
        return first.to(device), second.to(device)

    def reset_randlora_parameters(self, adapter_name: str) -> None:
        """Start an adapter anew."""
        self.restart(adapter_name)


@method(
    "RANDLORA",
    RandLoraConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING,
    dropout="randlora_dropout",
    settings={"r": "r", "scaling": "scaling"},
    names={"lambda_": "randlora_lambda"},
    in_common=("projection_prng_key", "save_projection"),
    rule=BasesLayer,
)
class RandLora:
    """W + alpha / r Q P. Q holds the columns of n bases, P their rows, scaled; turned if outputs are fewer."""

    trained, kept, shared, repeated = ("lambda_", "gamma"), ("A", "B"), ("A", "B"), ("A", "B")

    def check(c: RandLoraConfig, others: Sequence[RandLoraConfig]) -> None:
        """Refuse what is no rank."""
        check_counts(c, "r")

    def values(c: RandLoraConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Give the scaling, and how many bases make up the full rank."""
        return {"scaling": c.randlora_alpha / c.r, "n": math.ceil(min(shape) / c.r)}

    def shared_tensors(targets: Mapping[str, Shape], c: RandLoraConfig) -> dict[str, Frozen]:
        """Tell the bases that fit the largest layer: rows A (r, 1, smaller side), columns B (larger, n, r)."""
        smaller, larger = sorted(max(sizes) for sizes in zip(*targets.values(), strict=True))
        generator = torch.Generator().manual_seed(c.projection_prng_key)

        def basis(*shape: int) -> Frozen:
            if c.sparse or c.very_sparse:
                make = partial(sparse_basis, shape, math.sqrt(smaller) if c.very_sparse else 3, generator)
            else:
                make = partial(random_basis, shape, generator)
            return (Kept if c.save_projection else Frozen)(make, shape, rounded=True)

        return {"A": basis(c.r, 1, smaller), "B": basis(larger, math.ceil(smaller / c.r), c.r)}

    def tensors(shape: Shape, c: RandLoraConfig) -> dict[str, Any]:
        """Tell the scalings of the bases, lambda (r, n) and gamma (n, smaller side)."""
        start, gamma = (0.0, 1 / min(shape)) if c.init_weights else (nn.init.normal_, 1 / max(shape))
        scales = Trained((c.r, c.n), start, shape.dtype)
        return {"lambda_": scales, "gamma": Trained((c.n, min(shape)), gamma, shape.dtype)}

    def low_rank(t: Tensors, shape: Shape, c: RandLoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Give Q, (larger, n r), and the scaled P, (n r, smaller); their inner indices are not in the same order."""
        smaller, larger = sorted(shape)
        rows, columns = t.A[..., :smaller].to(t.gamma), t.B[:larger].flatten(1)[:, : c.n * c.r].to(t.gamma)
        rows = UniqueBaseGrad.of(rows, t.lambda_ * c.scaling, t.gamma).flatten(0, 1)
        return (columns, rows) if shape[1] <= shape[0] else (rows.T, columns.T)


RandLoraLayer, Linear = RandLora.Layer, RandLora.Linear


__getattr__ = old_names(__name__)
