# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Lily: factors that layers share, on the side of the outputs a mixture of experts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...configs.checks import check_counts
from ...layers.new_tensors import draw_
from ...utils.constants import TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ...utils.quantization_utils import stored_weight
from ..declared.layers import DeclaredTerm
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, TrainedModule, trained_linear
from .config import LilyConfig
from .maths import draw_linear_


class LilyTerm(DeclaredTerm):
    """All samples of a batch have one mixture, so they cannot have an adapter each."""

    supports_mixed_batch = False


@method(
    "LILY",
    LilyConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING,
    settings={"r": "r", "scaling": "scaling", "stride_A": "stride_A", "num_B": "num_B"},
    rule=LilyTerm,
)
class Lily:
    """x W' + s h (sum of p_k B_k), h = x A'; p is the mean over the batch of softmax(h R')."""

    modules = ("A", "B", "router")

    def check(c: LilyConfig, others: Sequence[LilyConfig]) -> None:
        """Refuse ranks that are none."""
        check_counts(c, "r")

    def tensors(shape: Shape, c: LilyConfig) -> dict[str, TrainedModule]:
        """Tell A (r, in), the router R (experts, r), and B (experts * r, out)."""
        out, inputs = shape
        sizes = {"A": (c.r, inputs), "B": (c.num_B * c.r, out), "router": (c.num_B, c.r)}

        def draw(tensor: torch.Tensor) -> None:
            draw_(tensor, stored_weight(shape.layer), draw_linear_)

        def draw_after_layers(tensor: torch.Tensor) -> None:
            for size in sizes.values() if not tensor.is_meta else ():  # what making three layers would draw
                draw_linear_(torch.empty(size))
            draw(tensor)

        starts = {"A": draw_after_layers, "router": draw, "B": nn.init.zeros_ if c.init_weights else draw}
        return {name: trained_linear(*sizes[name][::-1], start) for name, start in starts.items()}

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: LilyConfig) -> torch.Tensor:
        """Mix the experts, and multiply by A and by what comes of it."""
        h = F.linear(x, t.A.weight)
        shares = F.linear(h, t.router.weight).softmax(dim=-1).view(-1, c.num_B).mean(dim=0)
        mixed = (shares @ t.B.weight.view(c.num_B, -1)).view(c.r, shape[0])
        return (h if c.scaling == 1 else h * c.scaling) @ mixed


LilyLayer, Linear = Lily.Layer, Lily.Linear


__getattr__ = old_names(__name__)
