# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""TinyLoRA: a few trained numbers mix fixed directions between the first singular vectors of a weight."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained
from .config import TinyLoraConfig
from .maths import directions, singular_factors, uniform_


@method(
    "TINYLORA",
    TinyLoraConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear", nn.Embedding: "Embedding"},
    targets=TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING,
    dropout="tinylora_dropout",
    settings={"r": "r"},
    in_common=("save_projection",),
)
class TinyLora:
    """W + B R A with R = sum of v_i P_i. Layers of a group have one v; B and A are singular vectors of W."""

    trained, kept, shared, groups = ("v",), ("A", "B", "P"), ("v",), {"v": "group"}

    def check(c: TinyLoraConfig, others: Sequence[TinyLoraConfig]) -> None:
        """Refuse starts that there are not."""
        if c.init_weights not in (True, False, "uniform"):
            raise PeftValueError(f'init_weights must be True, False or "uniform", found {c.init_weights!r}')

    def values_of_all(targets: Mapping[str, Shape], c: TinyLoraConfig) -> dict[str, dict[str, int]]:
        """Number the targets, and give as many of them in a row a vector as share it."""
        groups = max(1, round(len(targets) * (1 - c.weight_tying)))
        size = max(1, len(targets) // groups)
        return {name: {"j": j, "group": min(j // size, groups - 1)} for j, name in enumerate(targets)}

    def shared_tensors(targets: Mapping[str, Shape], c: TinyLoraConfig) -> dict[str, dict[int, Trained]]:
        """Tell the vectors, (u,) for each group."""
        start = (
            0.0 if c.init_weights is True else partial(uniform_, c.init_v_bound, next(iter(targets.values())).dtype)
        )
        numbers = TinyLora.values_of_all(targets, c).values()
        return {"v": {j["group"]: Trained((c.u,), start) for j in numbers}}

    def tensors(shape: Shape, c: TinyLoraConfig) -> dict[str, Any]:
        """Tell the singular vectors, A (r, in) and B (out, r), and the directions, P (u, r, r)."""
        r = min(c.r, *shape)
        is_embedding = isinstance(shape.layer, nn.Embedding)
        halves = lru_cache(lambda: singular_factors(shape.weight.T if is_embedding else shape.weight, r))
        return {
            "A": Kept(lambda: halves()[1]),
            "B": Kept(lambda: halves()[0]),
            "P": (Kept if c.save_projection else Frozen)(
                partial(directions, c.projection_seed + c.j, c.u, r), (c.u, r, r), rounded=True
            ),
        }

    def low_rank(t: Tensors, shape: Shape, c: TinyLoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Give B R, (out, r), and A, (r, in); of embeddings (R A)' and B', as they keep the transposed weight."""
        core = torch.einsum("u,uij->ij", t.v.to(t.P.device), t.P)
        return (t.A.T @ core.T, t.B.T) if isinstance(shape.layer, nn.Embedding) else (t.B @ core, t.A)


TinyLoraLayer, Linear, Embedding = TinyLora.Layer, TinyLora.Linear, TinyLora.Embedding


__getattr__ = old_names(__name__)
