# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoHa: W + scaling * (A1 B1) * (A2 B2), where * between matrices multiplies entry by entry."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from ..families.lycoris import PATTERNS, SETTINGS, LycorisLayer, LycorisTuner, start_of, values_of
from .config import LoHaConfig
from .maths import HadaWeight as HadaWeight
from .maths import HadaWeightCP as HadaWeightCP
from .maths import low_rank_factors, make_weight, make_weight_cp


# Cost of one pass over a delta of one entry, in multiplications of a matrix product. Measured, and not critical.
ELEMENTWISE_COST = 16
# Cost of making the factors of the delta, in tokens that meet them.
FACTORS_COST = 4


@method(
    "LOHA",
    LoHaConfig,
    prefix="hada_",
    kinds={nn.Linear: "Linear", nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d"},
    patterns=PATTERNS,
    targets=TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    settings=SETTINGS,
    rule=LycorisLayer,
    model=LycorisTuner,
)
class LoHa:
    """A layer with the product, entry by entry, of two matrices of low rank added to its weight."""

    trained = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    zero_at_start = {True: ("w2_b",), False: ()}
    values = values_of

    def tensors(shape: Shape, c: LoHaConfig) -> dict[str, Trained]:
        """Tell the factors, in Tucker form if the config asks for it and the layer has a kernel to speak of."""
        out, inputs = shape
        size = math.prod(shape.kernel)
        if not (c.use_effective_conv2d and size > 1):
            shapes = {name: (out, c.r) if name.endswith("a") else (c.r, inputs) for name in LoHa.trained[:4]}
        else:
            shapes = {name: (c.r, out if name.endswith("a") else inputs // size) for name in LoHa.trained[:4]}
            # checkpoints have four dimensions here
            shapes["t1"] = shapes["t2"] = (c.r, c.r, *shape.kernel, *[1] * (2 - len(shape.kernel)))
        return {name: Trained(sizes, start_of(LoHa, name, c)) for name, sizes in shapes.items()}

    def delta(t: Tensors, shape: Shape, c: LoHaConfig) -> torch.Tensor:
        """Compute the delta; see `make_weight` and `make_weight_cp`."""
        if t.t1 is not None:
            return make_weight_cp(t.t1, t.w1_a, t.w1_b, t.t2, t.w2_a, t.w2_b, c.scaling)
        return make_weight(t.w1_a, t.w1_b, t.w2_a, t.w2_b, c.scaling)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: LoHaConfig) -> torch.Tensor:
        """Compute what the delta adds to the output, through factors of rank r * r."""
        left, right = low_rank_factors(t.w1_a * c.scaling, t.w1_b, t.w2_a, t.w2_b)
        return F.linear(F.linear(x.to(left.dtype), right), left)

    def builds(t: Tensors, x: torch.Tensor, shape: Shape, c: LoHaConfig, apart: bool) -> bool:
        """Compare the two ways to compute, by the multiplications that each adds to those of the base layer."""
        if type(shape.layer) is not nn.Linear:
            return True
        out, inputs = shape
        tokens = x.numel() // max(inputs, 1)
        passes = 3 if torch.is_grad_enabled() else 1
        # Added to the weight, a delta costs one more product only in the backward pass, for its own gradient.
        products = passes if apart else passes // 2
        building = inputs * out * (products * tokens + passes * (2 * c.r + ELEMENTWISE_COST))
        return building < passes * c.r**2 * (inputs + out) * (tokens + FACTORS_COST)


LoHaLayer, Linear, Conv1d, Conv2d = LoHa.Layer, LoHa.Linear, LoHa.Conv1d, LoHa.Conv2d


__getattr__ = old_names(__name__)
