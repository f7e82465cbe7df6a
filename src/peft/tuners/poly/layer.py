# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Poly: each layer has several low-rank skills, and each task its own mixture of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...configs.checks import check_counts
from ...layers.call_context import calling, task_of_rows
from ...utils.constants import TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredTerm
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained, TrainedModule
from .config import PolyConfig
from .maths import draw_skills_, mix
from .router import PolyRouter, check_router, get_router


class PolyTerm(DeclaredTerm):
    """Layers of Poly can be told the tasks themselves, too."""

    def forward(
        self, x: torch.Tensor, *args: Any, task_ids: torch.Tensor | Sequence[int] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute the base layer with the active adapters.

        Args:
            x: (batch, ..., in)
            args: passed on to the base layer.
            task_ids: (batch,) task of each sample; left out, those of the call that the layer is part of.
            kwargs: passed on too, but for `adapter_names`.
        """
        if task_ids is None:
            return super().forward(x, *args, **kwargs)
        with calling(task_ids=task_ids):
            return super().forward(x, *args, **kwargs)

    def forward_rows(
        self, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute samples of a batch, each with its own task."""
        each = task_of_rows(x, self.source(adapter).settings[adapter].n_tasks)
        each = each.repeat_interleave(len(x) // len(each))
        with calling(task_ids=each[rows.to(each.device)]):
            return super().forward_rows(adapter, rows, x, *args, **kwargs)


@method(
    "POLY",
    PolyConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING,
    names={"A": "poly_lora_A", "B": "poly_lora_B"},
    settings={name: name for name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type")},
    rule=PolyTerm,
)
class Poly:
    """x W' + x A_t B_t / r: A_t and B_t are mixed of skills, as the sample's task t wants them."""

    trained, modules = ("A", "B"), ("router",)

    def check(c: PolyConfig, others: Sequence[PolyConfig]) -> None:
        """Refuse sizes and routers that there are not."""
        check_router(c)
        check_counts(c, "r", "n_tasks", "n_skills", "n_splits")

    def tensors(shape: Shape, c: PolyConfig) -> dict[str, Any]:
        """Tell the skills, A (splits, skills, in / splits, r), B (splits, skills, r, out / splits), and the router."""
        if any(size % c.n_splits for size in shape):
            raise PeftValueError(f"n_splits={c.n_splits} has to divide inputs and outputs, found {shape[::-1]}")
        (out, inputs), sizes = (size // c.n_splits for size in shape), (c.n_splits, c.n_skills)
        return {
            "A": Trained((*sizes, inputs, c.r), draw_skills_),
            "B": Trained((*sizes, c.r, out), 0.0 if c.init_weights else draw_skills_),
            "router": TrainedModule(partial(get_router, c, device="meta"), PolyRouter.reset, ((c.n_tasks, *sizes),)),
        }

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: PolyConfig) -> torch.Tensor:
        """Multiply the rows of each sample by the skills, mixed for its task."""
        a, b = mix(t.router(task_of_rows(x, c.n_tasks)), t.A, t.B)
        return ((x.reshape(len(a), -1, shape[1]) @ a @ b) / c.r).reshape(*x.shape[:-1], shape[0])


PolyLayer, Linear = Poly.Layer, Poly.Linear


__getattr__ = old_names(__name__)
