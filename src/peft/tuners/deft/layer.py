# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DEFT: what a weight writes into a few directions is removed, and something that is trained put in its place."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layers.scaling import Unscaled
from ...utils.constants import TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from .config import DeftConfig
from .maths import directions


class ReplacingLayer(Unscaled, DeclaredAdditive):  # half of a removal is another method
    """A layer that replaces what lies in a few directions, with what the released package lets do with it."""

    def reset_deft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for what changes nothing, False for random numbers.
        """
        self.restart(adapter_name, init_weights=init_weights)


@method(
    "DEFT",
    DeftConfig,
    kinds={nn.Linear: "DeftLinear", Conv1D: "DeftLinear"},
    targets=TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING,
    dropout="deft_dropout",
    settings={
        "deft_r": "r",
        "deft_decomposition": "decomposition_method",
        "deft_init_scale": "init_scale",
        "deft_para": "para",
        "deft_scaling": "scaling",
    },
    rule=ReplacingLayer,
)
class Deft:
    """A layer in which something else is written into a few directions."""

    trained = ("P", "R")

    def values(c: DeftConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Find the number of directions, and the scale of what is put there."""
        if c.r <= 0:
            raise PeftValueError(f"r must be positive, found {c.r}")
        r = min(c.r, shape[0])
        return {"r": r, "scaling": c.alpha / r if c.alpha else 1.0}

    def tensors(shape: Shape, c: DeftConfig) -> dict[str, Trained | None]:
        """Tell P (out, r), and R (r, in) if something is put into the directions."""
        started: list[torch.Tensor] = []

        def start_r(r: torch.Tensor) -> None:
            if c.init_weights:
                _, read = directions(started.pop(), c.decomposition_method)
                r.copy_(read.T @ shape.weight.to(read) / c.scaling)
            else:
                r.normal_(std=0.02 * c.init_scale)

        r = None if c.para else Trained((c.r, shape[1]), start_r)
        return {"P": Trained((shape[0], c.r), lambda p: started.append(p.normal_(std=0.02))), "R": r}

    def delta(t: Tensors, shape: Shape, c: DeftConfig, w: torch.Tensor) -> torch.Tensor:
        """Remove, and put something there, (out, in)."""
        into, read = directions(t.P, c.decomposition_method)
        removed = read.T @ w.to(read.dtype)
        return into @ (-removed if t.R is None else c.scaling * t.R - removed)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: DeftConfig, y: torch.Tensor) -> torch.Tensor:
        """Find in the outputs what is to be removed."""
        into, read = directions(t.P, c.decomposition_method)
        removed = y @ read
        return F.linear(-removed if t.R is None else c.scaling * F.linear(x, t.R) - removed, into)


DeftLayer, DeftLinear = Deft.Layer, Deft.DeftLinear


__getattr__ = old_names(__name__)
