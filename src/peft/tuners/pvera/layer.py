# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PVeRA: VeRA with a learned normal distribution between its projections, from which training draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...configs.checks import check_counts
from ...utils.constants import TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Frozen, Shape, Tensors, Trained
from ..families.projections import ProjectedLayer, corners, random_projections
from .config import PveraConfig
from .maths import noise_like


class DrawingLayer(ProjectedLayer):
    """A layer with vectors that can start anew."""

    cut = {"pvera_A": (1,), "pvera_B": (0,)}

    def reset_pvera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """
        Start an adapter's vectors anew, b at zero. Without such an adapter nothing is done.

        Args:
            adapter_name: name.
            d_initial: what d starts at.
        """
        if adapter_name in self.settings:
            self.restart(adapter_name, init_weights=True, d_initial=d_initial)


@method(
    "PVERA",
    PveraConfig,
    prefix="pvera_lambda_",
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING,
    dropout="pvera_dropout",
    settings={"r": "r", "sample_at_inference": "sample_at_inference", "pvera_generator": "generator"},
    names={"A": "pvera_A", "B": "pvera_B"},
    rule=DrawingLayer,
    in_common=("projection_prng_key", "save_projection"),
)
class Pvera:
    """W + diag(b) B diag(d) A. The first half of d A x are means, and the second half logarithms of variances."""

    trained, kept, shared = ("b", "d"), ("A", "B"), ("A", "B")

    def check(c: PveraConfig, others: Sequence[PveraConfig]) -> None:
        """Refuse what is no rank."""
        check_counts(c, "r")

    def values(c: PveraConfig, names: Sequence[str], shape: Shape) -> dict[str, torch.Generator | None]:
        """Give the layer the generator that it draws from."""
        seed = c.generator_seed
        return {"generator": None if seed is None else torch.Generator().manual_seed(seed)}

    def shared_tensors(targets: Mapping[str, Shape], c: PveraConfig) -> dict[str, Frozen]:
        """Tell the projections, A (2r, most inputs) and B (most outputs, r)."""
        return random_projections(targets, c, 2 * c.r, c.r)

    def tensors(shape: Shape, c: PveraConfig) -> dict[str, Any]:
        """Tell the vectors, b (out,) and d (2r,)."""

        def start(d: torch.Tensor) -> None:
            nn.init.normal_(d)  # drawn in either case, so that what comes after it is the same
            if c.init_weights:
                d.fill_(c.d_initial)

        b = Trained((shape[0],), 0.0 if c.init_weights else 1.0)
        return {"b": b, "d": Trained((2 * c.r,), start, shape.dtype)}

    def delta(t: Tensors, shape: Shape, c: PveraConfig) -> torch.Tensor:
        """Compute diag(b) B diag(d) A from the halves that give means, (out, in)."""
        a, b = corners(t, shape, t.d)
        return (t.b.unsqueeze(1) * b) @ (t.d[: c.r].unsqueeze(1) * a[: c.r])

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: PveraConfig, training: bool) -> torch.Tensor:
        """Compute b * B z, with means for z, or z drawn from the distribution."""
        (a, b), r = corners(t, shape, t.d), c.r
        if not training and not c.sample_at_inference:
            return F.linear(F.linear(x, a[:r]) * t.d[:r], b) * t.b
        mean, log_variance = (F.linear(x, a) * t.d).split(r, dim=-1)
        drawn = mean + noise_like(log_variance, c.generator) * (log_variance / 2).exp()
        return F.linear(drawn, b) * t.b


PveraLayer, Linear = Pvera.Layer, Pvera.Linear


__getattr__ = old_names(__name__)
