# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HRA: inputs are reflected at trained directions, one after the other."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layers.merging.changes import changes_adapter
from ...layers.merging.checks import check_adapters_to_merge as check_adapters_to_merge
from ...utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..base import BaseTunerLayer as BaseTunerLayer
from ..declared.layers import with_values
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from ..families.rotations import RotationLayer, full_precision
from .config import HRAConfig
from .maths import Reflections, orthogonal_reflections, reflections


class ReflectingLayer(RotationLayer):
    """A layer whose inputs are reflected, with what the released package lets do with it."""

    @changes_adapter
    def reset_hra_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, as the identity if the number of reflections is even.

        Args:
            adapter_name: name.
        """
        self.start(adapter_name, with_values(self.settings[adapter_name], {"init_weights": True}))

    @changes_adapter
    def reset_hra_parameters_random(self, adapter_name: str) -> None:
        """
        Start an adapter anew, at random.

        Args:
            adapter_name: name.
        """
        self.start(adapter_name, with_values(self.settings[adapter_name], {"init_weights": False}))

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> torch.Tensor:
        """
        Build the product of the reflections, H_1 ... H_r. It is meant for looking at; nothing else needs it.

        Args:
            adapter_name: name.
            reverse: in the opposite order.

        Returns:
            (features, features)
        """
        product = super().get_delta_weight(adapter_name)
        return product if reverse else product.T


@method(
    "HRA",
    HRAConfig,
    kinds={nn.Conv2d: "HRAConv2d", Conv1D: "HRALinear", nn.Linear: "HRALinear"},
    targets=TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING,
    settings={"hra_r": "r", "hra_apply_GS": "apply_GS"},
    rule=ReflectingLayer,
)
class HRA:
    """A layer whose inputs are reflected; of convolutions the rows of the weight are."""

    trained = ("u",)

    def tensors(shape: Shape, c: HRAConfig) -> dict[str, Trained]:
        """Tell the directions, (features, r)."""
        if c.r < 1:
            raise PeftValueError(f"r must be at least 1, found {c.r}")
        return {"u": Trained((shape[1], c.r), lambda u: HRA.start(u, c))}

    def start(u: torch.Tensor, c: HRAConfig) -> None:
        """Start with pairs of reflections that cancel, where that is wanted and can be, else at random."""
        if c.init_weights and c.r % 2:
            warn(f"r={c.r} is odd: reflections cancel in pairs, so a new adapter changes the model's outputs at once")
        # of two equal directions nothing would remain of the second one after Gram-Schmidt
        if not c.init_weights or c.r % 2 or c.apply_GS:
            nn.init.kaiming_uniform_(u, a=5**0.5)
            return
        half = torch.empty_like(u[:, ::2])
        nn.init.kaiming_uniform_(half, a=5**0.5)
        u.copy_(half.repeat_interleave(2, dim=1))

    def rotation(t: Tensors, shape: Shape, c: HRAConfig, training: bool) -> Reflections:
        """Compute the product of the reflections that rows meet; the weight meets them in the opposite order."""
        product = orthogonal_reflections if c.apply_GS else reflections
        return product(full_precision(t.u)).transposed()


HRALayer, HRALinear, HRAConv2d = HRA.Layer, HRA.HRALinear, HRA.HRAConv2d


__getattr__ = old_names(__name__)
