# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PSOFT: the principal subspace of a weight is rotated and stretched."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Kept, Shape, Tensors, TrainedModule
from .config import PsoftConfig
from .maths import OrthLayer, principal_factors


SHOWN = ("r", "psoft_alpha", "scaling", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "ab_svd_init")


@method(
    "PSOFT",
    PsoftConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING,
    dropout="psoft_dropout",
    settings={name: name for name in SHOWN},
    names={"A": "_psoft_A_cache", "B": "_psoft_B_cache"},
)
class Psoft:
    """A layer whose weight is turned and stretched in its principal subspace."""

    modules, kept = ("R",), ("A", "B")
    optional = kept  # files of the release lack them

    def values(c: PsoftConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Find what the update is multiplied by."""
        if c.r > min(shape):
            raise PeftValueError(f"r={c.r} must be at most {min(shape)}, the smaller side of a weight {tuple(shape)}")
        return {"scaling": c.psoft_alpha / c.r}

    def tensors(shape: Shape, c: PsoftConfig) -> dict[str, Any]:
        """Tell what turns, R, and the factors of the subspace, A (r, in) and B (out, r), which outlast the weight."""

        rounds = c.psoft_svd_lowrank_niter if c.psoft_svd == "lowrank" else None
        how = c.r, c.scaling, c.ab_svd_init == "pissa_init", rounds, c.random_seed
        factors = cache(lambda: principal_factors(shape.weight, *how))

        def make() -> OrthLayer:
            series = c.use_cayley_neumann, c.num_cayley_neumann_terms, c.cayley_neumann_eps
            return OrthLayer(c.r, c.psoft_orth, c.psoft_mag_b, c.psoft_mag_a, *series)

        return {
            "R": TrainedModule(make, lambda module: module.reset_parameters(c.init_weights)),
            "A": Kept(lambda: factors()[1]),
            "B": Kept(lambda: factors()[0]),
        }

    def delta(t: Tensors, shape: Shape, c: PsoftConfig) -> torch.Tensor:
        """Turn the subspace, and take it out as it was, (out, in)."""
        a = t.A.to(t.R.weight.dtype)
        return c.scaling * (t.B.to(a.dtype) @ (t.R(a.T).T - a))

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: PsoftConfig) -> torch.Tensor:
        """Bring the input into the subspace and back."""
        inside = F.linear(x, t.A.to(x.dtype))
        return c.scaling * F.linear(t.R(inside) - inside, t.B.to(x.dtype))


PsoftLayer, Linear = Psoft.Layer, Psoft.Linear


__getattr__ = old_names(__name__)
