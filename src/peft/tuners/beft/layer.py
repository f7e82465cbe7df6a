# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BEFT: a vector that is added to the outputs of a layer."""

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..declared.layers import DeclaredAdditive
from ..declared.method import DeclaredModel, method
from ..declared.tensors import Shape, Tensors, Trained
from .config import BeftConfig


class BiasLayer(DeclaredAdditive):
    """A layer with another bias, with what the released package lets do with it."""

    def reset_beft_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, with zeros.

        Args:
            adapter_name: name.
        """
        self.restart(adapter_name, init_weights=True)


class BiasModel(DeclaredModel):
    """A model with BEFT; the arguments are those of `BaseTuner`."""

    def _believe_layers(self, config: BeftConfig, targets: list[nn.Module]) -> None:
        super()._believe_layers(config, targets)
        if any(target.bias is None for target in targets if isinstance(target, nn.Linear)):
            warn(
                "BEFT was given layers without a bias; they can be trained and saved, but not merged, so leave them "
                "out if adapters are to be merged"
            )


@method(
    "BEFT",
    BeftConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING,
    names={"v": "beft_bias"},
    rule=BiasLayer,
    model=BiasModel,
)
class Beft:
    """A layer with a trained vector added to its bias."""

    trained = ("v",)

    def tensors(shape: Shape, c: BeftConfig) -> dict[str, Trained]:
        """Tell the vector, as a row."""

        def start(v: torch.Tensor) -> None:
            v.normal_()  # also where that is thrown away, so that what others draw does not depend on it
            if c.init_weights:
                v.zero_()

        return {"v": Trained((1, shape[0]), start)}

    def bias(t: Tensors, shape: Shape, c: BeftConfig, b: torch.Tensor | None) -> torch.Tensor:
        """Give the vector, (out,)."""
        return t.v.flatten()


BeftLayer, Linear = Beft.Layer, Beft.Linear


__getattr__ = old_names(__name__)
