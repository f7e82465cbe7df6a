# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GraLoRA: W + a grid of k x k blocks with a low-rank update each, and optionally plain LoRA beside."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained, trained_linear
from .config import GraloraConfig


uniform_ = partial(nn.init.kaiming_uniform_, a=5**0.5)  # within 1 / sqrt(columns)


@method(
    "GRALORA",
    GraloraConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING,
    dropout="gralora_dropout",
    settings={name: name for name in ("r", "hybrid_r", "alpha", "scaling", "gralora_k")},
)
class Gralora:
    """A layer with a low-rank update in each block of a grid added to its weight."""

    trained, modules = ("A", "B"), ("A_general", "B_general")

    def values(c: GraloraConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Check what has to fit the layer, and give the scaling."""
        (out, inputs), k = shape, c.gralora_k
        if c.r <= 0 or c.hybrid_r < 0:
            raise PeftValueError(f"r must be positive and hybrid_r not negative, found {c.r} and {c.hybrid_r}")
        if out % k or inputs % k:
            raise PeftValueError(f"gralora_k must divide the {inputs} inputs and {out} outputs of a target, found {k}")
        return {"scaling": c.alpha / (c.r + c.hybrid_r)}

    def tensors(shape: Shape, c: GraloraConfig) -> dict[str, Any]:
        """Tell the factors of the blocks, A (k, in / k, r) and B (k, r, out / k), and those of plain LoRA."""
        (out, inputs), k, r, hybrid = shape, c.gralora_k, c.r, c.hybrid_r
        drawn = []  # the B that was drawn along with A

        def start_a(a: torch.Tensor) -> None:
            for block in a:
                block.copy_(uniform_(torch.empty(r, inputs // k)).T)
                b = torch.empty(out // k, r)
                drawn.append((b.zero_() if c.init_weights else uniform_(b)).T)

        tensors = {
            "A": Trained((k, inputs // k, r), start_a),
            "B": Trained((k, r, out // k), lambda b: b.copy_(torch.stack(drawn))),
        }
        if hybrid:
            tensors["A_general"] = trained_linear(inputs, hybrid, uniform_)
            tensors["B_general"] = trained_linear(hybrid, out, nn.init.zeros_ if c.init_weights else uniform_)
        return tensors

    def delta(t: Tensors, shape: Shape, c: GraloraConfig) -> torch.Tensor:
        """Multiply the factors of each block, (out, in)."""
        k, q = c.gralora_k, c.r // c.gralora_k
        # block (j, i): pieces i of B[j] and j of A[i]
        b, a = t.B.unflatten(1, (k, q)), t.A.unflatten(2, (k, q))
        delta = torch.einsum("jiqo,injq->join", b, a).reshape(shape) * c.scaling
        return delta if t.A_general is None else delta + c.scaling * t.B_general.weight @ t.A_general.weight

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: GraloraConfig) -> torch.Tensor:
        """Multiply the parts of the input by their factors, and hand the pieces out to the parts of the output."""
        k = c.gralora_k
        parts = x.reshape(-1, k, shape[1] // k).transpose(0, 1) @ t.A  # (k, tokens, r)
        pieces = parts.unflatten(2, (k, -1)).permute(2, 1, 0, 3).flatten(2)
        y = (pieces @ t.B).transpose(0, 1).reshape(*x.shape[:-1], shape[0])
        return c.scaling * (y if t.A_general is None else y + t.B_general(t.A_general(x)))


GraloraLayer, Linear = Gralora.Layer, Gralora.Linear


__getattr__ = old_names(__name__)
