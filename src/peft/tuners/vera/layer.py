# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VeRA: two trained vectors around projections that all layers share."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Frozen, Shape, Tensors, Trained
from ..families.projections import ProjectedLayer, corners, random_projections
from .config import VeraConfig


class VectorLayer(ProjectedLayer):
    """A layer with vectors that can start anew."""

    cut = {"vera_A": (1,), "vera_B": (0,)}

    def reset_vera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """
        Start an adapter's vectors anew, b at zero.

        Args:
            adapter_name: name.
            d_initial: what d starts at.
        """
        self.restart(adapter_name, init_weights=True, d_initial=d_initial)


@method(
    "VERA",
    VeraConfig,
    prefix="vera_lambda_",
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    dropout="vera_dropout",
    settings={"r": "r"},
    names={"A": "vera_A", "B": "vera_B"},
    rule=VectorLayer,
    in_common=("projection_prng_key", "save_projection"),
)
class Vera:
    """W + diag(b) B diag(d) A. A and B fit the largest layer; a smaller one uses the corner that it needs."""

    trained, kept, shared = ("b", "d"), ("A", "B"), ("A", "B")

    def check(c: VeraConfig, others: list[VeraConfig]) -> None:
        """Refuse what is no rank."""
        if not isinstance(c.r, int) or c.r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {c.r!r}")

    def shared_tensors(targets: Mapping[str, Shape], c: VeraConfig) -> dict[str, Frozen]:
        """Tell the projections, A (r, most inputs) and B (most outputs, r)."""
        return random_projections(targets, c, c.r, c.r)

    def tensors(shape: Shape, c: VeraConfig) -> dict[str, Any]:
        """Tell the vectors, b (out,) and d (r,)."""
        b, d = (0.0, c.d_initial) if c.init_weights else (1.0, nn.init.normal_)
        return {"b": Trained((shape[0],), b), "d": Trained((c.r,), d)}

    def delta(t: Tensors, shape: Shape, c: VeraConfig) -> torch.Tensor:
        """Compute diag(b) B diag(d) A, (out, in)."""
        a, b = corners(t, shape, t.d)
        return (t.b.unsqueeze(1) * b) @ (t.d.unsqueeze(1) * a)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: VeraConfig) -> torch.Tensor:
        """Compute b * B (d * A x)."""
        a, b = corners(t, shape, t.d)
        return F.linear(F.linear(x, a) * t.d, b) * t.b


VeraLayer, Linear = Vera.Layer, Vera.Linear


__getattr__ = old_names(__name__)
