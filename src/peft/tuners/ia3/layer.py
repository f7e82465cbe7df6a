# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3: one vector of factors per layer, W (l * x) for feedforward layers and l * (W x + b) for the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.matching import matching_entry
from ...utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.layers import DeclaredActivation
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from ..families.scales import CombinableScales
from .config import IA3Config


class ScaledLayer(DeclaredActivation):
    """A layer with factors that can start anew."""

    def reset_ia3_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter's factors anew, at one.

        Args:
            adapter_name: name.
        """
        self.restart(adapter_name, init_ia3_weights=True)


@method(
    "IA3",
    IA3Config,
    kinds={nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d", nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    settings={"is_feedforward": "is_feedforward"},
    rule=ScaledLayer,
    model=CombinableScales,
)
class IA3:
    """A layer whose inputs or outputs are multiplied by factors."""

    trained = ("l",)

    def values(c: IA3Config, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Say whether it is the inputs that are scaled."""
        return {"is_feedforward": any(matching_entry(c.feedforward_modules, name) is not None for name in names)}

    def tensors(shape: Shape, c: IA3Config) -> dict[str, Trained]:
        """Tell the factors, in a shape that says which side they scale."""
        count = shape.features[c.is_feedforward]
        sizes = (1, count) if c.is_feedforward or shape.kernel else (count, 1)
        start = nn.init.ones_ if c.init_ia3_weights else nn.init.normal_
        return {"l": Trained((*sizes, *[1] * len(shape.kernel)), start)}

    def scale(t: Tensors, shape: Shape, c: IA3Config) -> torch.Tensor:
        """Give the factors, one per feature or channel."""
        return t.l.flatten()

    def of_input(c: IA3Config) -> bool:
        """Say whether they belong to the input."""
        return c.is_feedforward


IA3Layer, Linear, Conv2d, Conv3d = IA3.Layer, IA3.Linear, IA3.Conv2d, IA3.Conv3d


__getattr__ = old_names(__name__)
