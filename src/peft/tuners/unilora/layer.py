# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Uni-LoRA: W + B A, with B and A put together from the entries of one vector that all layers share."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING
from ..declared.method import method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained
from .config import UniLoraConfig
from .maths import entries, scales, start_vector


@method(
    "UNILORA",
    UniLoraConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING,
    dropout="unilora_dropout",
    settings={"r": "r"},
)
class UniLora:
    """A layer with factors out of one vector added to its weight."""

    trained, shared = ("theta_d",), ("theta_d",)
    kept = ("indices_A", "indices_B", "scales_A", "scales_B")

    def values_of_all(targets: Mapping[str, Shape], c: UniLoraConfig) -> dict[str, dict[str, int]]:
        """Give each target its part of all places, from `offset` on."""
        ends = list(accumulate((c.r * sum(shape) for shape in targets.values()), initial=0))
        return {name: {"offset": end, "places": ends[-1]} for name, end in zip(targets, ends, strict=False)}

    def shared_tensors(targets: Mapping[str, Shape], c: UniLoraConfig) -> dict[str, Trained]:
        """Tell the vector, (theta_d_length,)."""
        dtype = next(iter(targets.values())).dtype
        return {"theta_d": Trained((c.theta_d_length,), partial(start_vector, c, dtype))}

    def tensors(shape: Shape, c: UniLoraConfig) -> dict[str, Any]:
        """Tell which entries go to A (r, in) and B (out, r), and what they are multiplied by there."""
        spec, tensors, first = Kept if c.save_indices else Frozen, {}, c.offset
        for name, size in (("A", (c.r, shape[1])), ("B", (shape[0], c.r))):
            where = c.places, c.theta_d_length, c.proj_seed, first, size
            tensors[f"indices_{name}"] = spec(partial(entries, *where), size)
            tensors[f"scales_{name}"] = spec(partial(scales, *where), size)
            first += c.r * shape[1]
        return tensors

    def low_rank(t: Tensors, shape: Shape, c: UniLoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Put B (out, r) and A (r, in) together."""
        theta = t.theta_d.to(t.scales_A.device)
        b = theta.take(t.indices_B) * t.scales_B.to(theta.dtype)
        return b, theta.take(t.indices_A) * t.scales_A.to(theta.dtype)


UniLoraLayer, Linear = UniLora.Layer, UniLora.Linear
