# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GLoRA: W * (1 + A) + B and b * (1 + D) + E + W C, where * multiplies entry by entry."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...anatomy.offload import tensor_of
from ...layers.merging.layer import take_adapter_out
from ...utils.constants import TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, TrainedModule
from .config import GloraConfig
from .maths import GloraPath, ZerosInFull, make_part


class PartwiseLayer(DeclaredAdditive):
    """A layer whose weight and bias are changed by parts, with what the released package lets do with it."""

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """
        Take merged adapters out of the base weight.

        Args:
            adapter_names: which; all of them if left out.
        """
        if adapter_names is None:
            super().unmerge()
        for name in adapter_names or ():
            take_adapter_out(self, name)


@method(
    "GLORA",
    GloraConfig,
    kinds={nn.Linear: "GloraLinear"},
    targets=TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING,
    settings={"r": "r"},
    rule=PartwiseLayer,
)
class Glora:
    """A layer whose weight and bias are scaled and shifted."""

    modules = ("A", "B", "C", "D", "E")

    def values(c: GloraConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Tell the form and the full shape of each part; without a bias nothing is made for it."""
        (out, inputs), bias = shape, tensor_of(shape.layer, "bias")
        c_form, d_e_form = ("none", "none") if bias is None else (c.config_C, c.config_D_E)
        parts = dict.fromkeys("AB", (c.config_A_B, (out, inputs))) | {"C": (c_form, (inputs, 1))}
        return {"parts": parts | dict.fromkeys("DE", (d_e_form, (out,)))}

    def tensors(shape: Shape, c: GloraConfig) -> dict[str, TrainedModule]:
        """Tell the parts: factors, a number per output (for C, per input), one number, or nothing."""

        def start(part: GloraPath) -> None:
            part.reset_parameters(c.init_weights)

        factors = tuple((size, c.r) for size in shape)
        return {name: TrainedModule(partial(make_part, *part, c.r), start, factors) for name, part in c.parts.items()}

    def saved_forms(c: GloraConfig) -> dict[str, ZerosInFull]:
        """Save zeros in the place of parts that are not there, as the released package reads them."""
        return {f"{name}.zeros": ZerosInFull(size) for name, (form, size) in c.parts.items() if form == "none"}

    def delta(t: Tensors, shape: Shape, c: GloraConfig, w: torch.Tensor) -> torch.Tensor:
        """Scale and shift the weight, (out, in)."""
        return w * t.A() + t.B()

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: GloraConfig, y: torch.Tensor) -> torch.Tensor:
        """Scale the weight only where outputs cannot be, and shift it never."""
        if c.config_A_B == "none":
            return x.new_zeros(())
        if c.config_A_B == "lora":
            return F.linear(x, shape.weight * t.A()) + F.linear(F.linear(x, t.B.Xu), t.B.Xd)
        return y * t.A().flatten() + x.sum(-1, keepdim=True) * t.B().flatten()

    def bias(t: Tensors, shape: Shape, c: GloraConfig, b: torch.Tensor | None) -> torch.Tensor | None:
        """Scale and shift the bias, if there is one, (out,)."""
        if b is None:
            return None
        change = b * t.D() + t.E()
        return change if c.config_C == "none" else change + (shape.weight.to(change.dtype) @ t.C()).squeeze(1)


GloraLayer, GloraLinear = Glora.Layer, Glora.GloraLinear


__getattr__ = old_names(__name__)
