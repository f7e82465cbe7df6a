# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoKr: W + scaling * kron(W1, W2), where each of the two may be a product of low-rank factors."""

import math

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from ..families.lycoris import PATTERNS, SETTINGS, LycorisLayer, LycorisTuner, start_of, values_of
from .config import LoKrConfig
from .maths import factorization, kron_forward, make_kron, make_weight_cp


class KroneckerLayer(LycorisLayer):
    """A layer whose factors can start as those of the LyCORIS package do."""

    def reset_adapter_parameters_lycoris_way(self, adapter_name: str) -> None:
        """
        Start an adapter anew with a second factor of zero, or part b of it.

        Args:
            adapter_name: name.
        """
        self.reset_adapter_parameters(adapter_name, init_weights="lycoris")


@method(
    "LOKR",
    LoKrConfig,
    kinds={nn.Linear: "Linear", nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d"},
    patterns=PATTERNS,
    targets=TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING,
    settings=SETTINGS,
    rule=KroneckerLayer,
    model=LycorisTuner,
)
class LoKr:
    """A layer with a Kronecker product added to its weight."""

    trained = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    zero_at_start = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}
    values = values_of

    def tensors(shape: Shape, c: LoKrConfig) -> dict[str, Trained]:
        """Tell W1 and W2, or their factors where these are of a lower rank than the matrix can have."""
        (out, inputs), kernel, r = shape, shape.kernel, c.r
        size = math.prod(kernel)
        (out_1, out_2), (in_1, in_2) = (factorization(n, c.decompose_factor) for n in (out, inputs // size))
        if c.decompose_both and r < max(out_1, in_1) / 2:
            shapes = {"w1_a": (out_1, r), "w1_b": (r, in_1)}
        else:
            shapes = {"w1": (out_1, in_1)}
        if r >= max(out_2, in_2) / 2:
            shapes["w2"] = (out_2, in_2, *kernel)
        elif c.use_effective_conv2d and size > 1:
            # checkpoints have four dimensions in the core
            shapes |= {"w2_a": (r, out_2), "w2_b": (r, in_2), "t2": (r, r, *kernel, *[1] * (2 - len(kernel)))}
        else:
            shapes |= {"w2_a": (out_2, r), "w2_b": (r, in_2 * size)}
        return {name: Trained(sizes, start_of(LoKr, name, c)) for name, sizes in shapes.items()}

    def factors(t: Tensors, c: LoKrConfig) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Give scaled W1, and W2 as a product, (k, r) and (r, n * kernel), or as None and (k, n, *kernel)."""
        w1 = (t.w1_a @ t.w1_b if t.w1 is None else t.w1) * c.scaling
        if t.w2 is not None:
            return w1, None, t.w2
        return (w1, t.w2_a, t.w2_b) if t.t2 is None else (w1, None, make_weight_cp(t.t2, t.w2_a, t.w2_b))

    def delta(t: Tensors, shape: Shape, c: LoKrConfig) -> torch.Tensor:
        """Compute the Kronecker product."""
        w1, outer, w2 = LoKr.factors(t, c)
        return make_kron(w1, w2 if outer is None else outer @ w2)

    def builds(t: Tensors, x: torch.Tensor, shape: Shape, c: LoKrConfig, apart: bool) -> bool:
        """Say whether the delta has to be built: where it is no Kronecker product of channels."""
        return shape.groups > 1 or (t.w2 is not None and t.w2.dim() == 3)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: LoKrConfig) -> torch.Tensor:
        """Compute what the delta adds to the output; see `kron_forward`."""
        return kron_forward(shape.layer, x, *LoKr.factors(t, c), shape.kernel)


LoKrLayer, Linear, Conv1d, Conv2d = LoKr.Layer, LoKr.Linear, LoKr.Conv1d, LoKr.Conv2d


__getattr__ = old_names(__name__)
