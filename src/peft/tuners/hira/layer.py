# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HiRA: W + W * (B A), where * multiplies entry by entry."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.kinds import CONVOLUTIONS, is_linear, is_plain
from ...utils.constants import TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..declared.layers import DeclaredAdditive
from ..declared.method import DeclaredModel, method
from ..declared.tensors import Shape, Tensors, Trained
from .config import HiraConfig


class HadamardLayer(DeclaredAdditive):
    """A layer whose weight is multiplied entry by entry, with what the released package lets do with it."""

    def reset_hira_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: as in the config.
        """
        self.restart(adapter_name, init_weights=init_weights)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Multiply by the changed weight, one product where weight and delta are two, where that is the same."""
        layer = self.base_layer
        if args or kwargs or not self._is_one_product(adapters, x):
            return super().adapter_forward(adapters, x, *args, **kwargs)
        factors = x.new_ones(())
        for adapter in adapters:
            factors = torch.addmm(factors, self.hira_B[adapter], self.hira_A[adapter])
        return F.linear(x, layer.weight * factors, layer.bias)

    def _is_one_product(self, adapters: list[str], x: torch.Tensor) -> bool:
        """Say whether the base layer is its weight, inputs are not dropped, and no digits of a delta get lost."""
        layer = self.base_layer
        if not is_plain(layer) or self.quantization_backend is not None or self._merge_state.contributions:
            return False
        types = {x.dtype, layer.weight.dtype, *(parameter.dtype for parameter in self.hira_A.values())}
        return (
            types in ({torch.float32}, {torch.float64})
            and not self._owners
            and not torch.is_autocast_enabled(x.device.type)
            and not any(isinstance(drop, nn.Dropout) and drop.training for drop in self.hira_dropout.values())
        )


class HadamardModel(DeclaredModel):
    """A model with HiRA; the arguments are those of `BaseTuner`."""

    def _believe_layers(self, config: HiraConfig, targets: list[nn.Module]) -> None:
        """Say what does not fit, and leave it in the config, as files of the released package do."""
        super()._believe_layers(copy.copy(config), targets)
        if config.rank_pattern:
            warn(f"rank_pattern has no effect on HiRA, nor has it in the released package; r={config.r} is used")


@method(
    "HIRA",
    HiraConfig,
    kinds={kind: kind.__name__ for kind in (nn.Linear, nn.Embedding, *CONVOLUTIONS)} | {Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING,
    dropout="hira_dropout",
    settings={"r": "r"},
    rule=HadamardLayer,
    model=HadamardModel,
)
class Hira:
    """A layer with its own weight, multiplied by a matrix of low rank entry by entry, added to its weight."""

    trained = ("A", "B", "embedding_A", "embedding_B")

    def tensors(shape: Shape, c: HiraConfig) -> dict[str, Trained]:
        """Tell the factors, A (r, in, *kernel) and B (out, r, 1, ..)."""
        (out, inputs), kernel = shape, shape.kernel
        if c.r <= 0:
            raise PeftValueError(f"r must be positive, found {c.r}")
        if c.init_weights not in (True, False, "gaussian"):
            raise PeftValueError(f"init_weights must be True, False or 'gaussian', found {c.init_weights!r}")
        is_embedding, drawn = isinstance(shape.layer, nn.Embedding), []
        is_gaussian = c.init_weights == "gaussian" and is_linear(shape.layer)
        size_b = (out, c.r, *[1] * len(kernel))

        def start_a(a: torch.Tensor) -> None:
            a.normal_()
            drawn.append(torch.randn(size_b))
            if is_gaussian:
                a.normal_(std=1 / c.r)
            elif c.init_weights:
                a.zero_() if is_embedding else a.uniform_(-(inputs**-0.5), inputs**-0.5)

        start_b = nn.init.normal_ if is_embedding else nn.init.zeros_
        a = Trained((c.r, shape.features[1] // shape.groups, *kernel), start_a)
        b = Trained(size_b, start_b if c.init_weights else lambda b: b.copy_(drawn.pop()))
        return {"embedding_A": a, "embedding_B": b} if is_embedding else {"A": a, "B": b}

    def delta(t: Tensors, shape: Shape, c: HiraConfig, w: torch.Tensor) -> torch.Tensor:
        """Multiply the weight, (out, in), entry by entry."""
        a, b = (t.A, t.B) if t.A is not None else (t.embedding_A, t.embedding_B)
        return w * (b.flatten(1) @ a.flatten(1)).to(w.dtype)


HiraLayer, Linear, Embedding = Hira.Layer, Hira.Linear, Hira.Embedding
Conv1d, Conv2d, Conv3d = Hira.Conv1d, Hira.Conv2d, Hira.Conv3d


__getattr__ = old_names(__name__)
