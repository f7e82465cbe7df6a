# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PEANuT: a small network turns the weight into what is added to it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ...utils.constants import TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, TrainedModule, trained_linear
from .config import PeanutConfig


uniform_ = partial(nn.init.kaiming_uniform_, a=5**0.5)  # within 1 / sqrt(columns)


class TweakingLayer(DeclaredAdditive):
    """A layer with a network that sees its weight, with what the released package lets do with it."""

    def reset_peanut_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for an update of zero, False for a random one.
        """
        self.restart(adapter_name, init_weights=init_weights)


@method(
    "PEANUT",
    PeanutConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING,
    settings={"r": "r", "depth": "depth", "scaling": "scaling", "act_fn": "act_fn", "res_num": "depth"},
    rule=TweakingLayer,
)
class Peanut:
    """A layer with what a network makes of its weight added to it."""

    modules = ("A", "B", "encoders", "decoders")

    def tensors(shape: Shape, c: PeanutConfig) -> dict[str, TrainedModule]:
        """Tell A (r, out), encoders and decoders (r, r), and B (out, r)."""
        out, _ = shape

        def start(weight: torch.Tensor) -> None:
            uniform_(weight).copy_(weight.to(shape.dtype) if shape.dtype.is_floating_point else weight)

        def start_first(weight: torch.Tensor) -> None:
            for size in [(c.r, out), *[(c.r, c.r)] * 2 * c.depth, (out, c.r)]:
                uniform_(weight.new_empty(size))  # the release draws all of them twice
            start(weight)

        def start_all(network: nn.ModuleList) -> None:
            for layer in network:
                start(layer.weight)

        def make() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(c.r, c.r, bias=False, device="meta") for _ in range(c.depth))

        return {
            "A": trained_linear(out, c.r, start_first),
            "encoders": TrainedModule(make, start_all, ((c.depth, c.r, c.r),)),
            "decoders": TrainedModule(make, start_all, ((c.depth, c.r, c.r),)),
            "B": trained_linear(c.r, out, nn.init.zeros_ if c.init_weights else start),
        }

    def codes(t: Tensors, w: torch.Tensor, c: PeanutConfig) -> torch.Tensor:
        """Bring the columns of the weight through all layers but the last, (in, r)."""
        act = ACT2FN[c.act_fn]
        encoded = [act(F.linear(w.detach().to(t.A.weight.dtype).T, t.A.weight))]
        for encoder in t.encoders:
            encoded.append(act(F.linear(encoded[-1], encoder.weight)))
        result = encoded.pop()
        for decoder in t.decoders:
            result = act(F.linear(result, decoder.weight)) + encoded.pop()
        return result

    def delta(t: Tensors, shape: Shape, c: PeanutConfig, w: torch.Tensor) -> torch.Tensor:
        """Bring the weight through the network, (out, in)."""
        return c.scaling * (t.B.weight @ Peanut.codes(t, w, c).T)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: PeanutConfig) -> torch.Tensor:
        """Let the input meet the network before its last layer, which is the widest."""
        return c.scaling * F.linear(x @ Peanut.codes(t, shape.weight, c), t.B.weight)


PeanutLayer, Linear = Peanut.Layer, Peanut.Linear


__getattr__ = old_names(__name__)
