# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OSF: all but the leading singular directions of a weight are trained, and kept orthogonal to these."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.patterns import compiled
from ..declared.layers import DeclaredAdditive
from ..declared.method import DeclaredModel, method
from ..declared.tensors import Frozen, Shape, Tensors, TrainedModule
from .config import OSFConfig
from .maths import split, with_gradient_apart


FACTORS = ("U_low", "S_low", "V_low")


class SubspaceLayer(DeclaredAdditive):
    """A layer that starts from the decomposition of its weight, which is made once."""

    @torch.no_grad()
    def start(self, adapter: str, c: OSFConfig) -> None:
        """
        Start an adapter anew.

        Args:
            adapter: name.
            c: its config.
        """
        t = self.tensors(adapter)
        for name, original in zip(FACTORS, (t.U0, t.S0, t.V0), strict=True):
            drawn = c.init_weights is False
            t.svd_params[name].copy_(torch.randn_like(original) if drawn else original)


class SubspaceModel(DeclaredModel):
    """A model with OSF; the arguments are those of `BaseTuner`."""

    def _resolve_targets(self, model: nn.Module, config: OSFConfig) -> None:
        """Adapt all linear layers of a model that there is no default for."""
        if config.target_modules is None:
            if self.get_model_config(model).get("model_type") not in self.target_module_mapping:
                config.target_modules = "all-linear"
        super()._resolve_targets(model, config)


@method(
    "OSF",
    OSFConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING,
    settings={"effective_rank": "effective_rank"},
    names={
        **{f"{name}0": f"_osf_{name}_low_init" for name in "USV"},
        **{f"{name}_high": f"_osf_{name}_high" for name in "UV"},
    },
    rule=SubspaceLayer,
    model=SubspaceModel,
)
class OSF:
    """A layer of whose weight all but the leading singular directions are trained."""

    modules, kept = ("svd_params",), ("U0", "S0", "V0", "U_high", "V_high")

    def values(c: OSFConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Find how many directions stay."""
        found = (
            v for p, v in (c.rank_pattern or {}).items() for name in names if compiled(f".*(?:{p}).*").fullmatch(name)
        )
        value, most = next(found, c.effective_rank), min(shape)
        is_share = isinstance(value, float) and 0 < value <= 1
        k = most // 2 if value is None else max(0, min(most, int(most * value if is_share else value)))
        if not k:
            raise PeftValueError(f"effective_rank={value} leaves none of the {most} directions of a weight as it is")
        return {"effective_rank": k}

    def tensors(shape: Shape, c: OSFConfig) -> dict[str, Any]:
        """Tell U (out, m), S (m,) and V (m, in), what they start from, and the directions that stay, if need be."""
        (out, inputs), m = shape, min(shape) - c.effective_rank
        parts = cache(lambda: split(shape.weight, c.effective_rank))
        sizes = zip(FACTORS, ((out, m), (m,), (m, inputs)), strict=True)
        parameters = {name: nn.Parameter(torch.empty(size, device="meta")) for name, size in sizes}
        made = {f"{name}0": Frozen(lambda i=i: parts()[1][i], rounded=True) for i, name in enumerate("USV")}
        return {
            **made,
            "U_high": Frozen(lambda: parts()[0][0], rounded=True) if out > inputs else None,
            "V_high": Frozen(lambda: parts()[0][2], rounded=True) if inputs > out else None,
            "svd_params": TrainedModule(partial(nn.ParameterDict, parameters), None),
        }

    def factors(t: Tensors) -> tuple[torch.Tensor, ...]:
        """Give U, S and V, with gradients orthogonal to what stays; where U0 or V0 tells what that is, by that."""
        u, s, v = (t.svd_params[name] for name in FACTORS)
        u = with_gradient_apart(u, *((t.U0, True) if t.U_high is None else (t.U_high, False)))
        basis, is_complement = (t.V0, True) if t.V_high is None else (t.V_high, False)
        return u, s, with_gradient_apart(v.mT, basis.mT, is_complement).mT

    def delta(t: Tensors, shape: Shape, c: OSFConfig) -> torch.Tensor:
        """Put what is trained in the place of what it started from, (out, in)."""
        u, s, v = OSF.factors(t)
        return (u * s) @ v - (t.U0 * t.S0) @ t.V0

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: OSFConfig) -> torch.Tensor:
        """Let the input meet one factor after the other."""
        u, s, v = OSF.factors(t)
        return F.linear(F.linear(x, v) * s, u) - F.linear(F.linear(x, t.V0) * t.S0, t.U0)


OSFLayer, Linear = OSF.Layer, OSF.Linear


__getattr__ = old_names(__name__)
