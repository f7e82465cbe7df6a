# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DeLoRA: a low-rank update whose directions are normalised, and whose strength is one trained number."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Kept, Shape, Tensors, Trained
from .config import DeloraConfig


SHORTEST = 1e-4  # shorter directions are not made longer
uniform_ = partial(nn.init.kaiming_uniform_, a=5**0.5)  # within 1 / sqrt(columns)


class NormalisedLayer(DeclaredAdditive):
    """A layer with normalised directions, with what the released package lets do with it."""

    def reset_delora_parameters(
        self, adapter_name: str, init_weights: bool = True, delora_lambda: float = 15.0
    ) -> None:
        """
        Start an adapter anew, and measure the weight anew.

        Args:
            adapter_name: name.
            init_weights: True for an update of zero, False for a random one.
            delora_lambda: strength.
        """
        self.restart(adapter_name, init_weights=init_weights, delora_lambda=delora_lambda)
        self.delora_w_norm[adapter_name].copy_(column_norms(self.shape))


@method(
    "DELORA",
    DeloraConfig,
    kinds={nn.Linear: "DeloraLinear"},
    patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
    targets=TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING,
    dropout="module_dropout",
    settings={"r": "r", "delora_dropout": "module_dropout"},
    rule=NormalisedLayer,
)
class Delora:
    """A layer with a low-rank update of normalised directions added to its weight."""

    trained, kept = ("A", "B", "lambda"), ("w_norm",)

    def tensors(shape: Shape, c: DeloraConfig) -> dict[str, Any]:
        """Tell A (r, in), B (out, r), the strength (1,), and the norms of the weight's columns (in,)."""
        out, inputs = shape
        return {
            "A": Trained((c.r, inputs), uniform_),
            "B": Trained((out, c.r), 0.0 if c.init_weights is True else uniform_),
            "lambda": Trained((1,), c.delora_lambda),
            "w_norm": Kept(partial(column_norms, shape)),
        }

    def delta(t: Tensors, shape: Shape, c: DeloraConfig) -> torch.Tensor:
        """Multiply the factors, (out, in)."""
        return (t.B * strengths(t, c)) @ (t.A * t.w_norm)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: DeloraConfig) -> torch.Tensor:
        """Multiply the input by one factor after the other."""
        return F.linear(F.linear(x * t.w_norm, t.A) * strengths(t, c), t.B)


def strengths(t: Tensors, c: DeloraConfig) -> torch.Tensor:
    """Give what each direction is multiplied by, (r,)."""
    lengths = t.A.norm(dim=1).clamp(min=SHORTEST) * t.B.norm(dim=0).clamp(min=SHORTEST)
    return getattr(t, "lambda") / c.r / lengths


def column_norms(shape: Shape) -> torch.Tensor:
    """Measure the columns of the base weight, (in,)."""
    return shape.weight.norm(dim=0)


DeloraLayer, DeloraLinear = Delora.Layer, Delora.DeloraLinear


__getattr__ = old_names(__name__)
