# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
KaSA: the base weight loses its smallest singular components, and the update has the form of an SVD.

Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", 2024, arXiv:2412.06071.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ....layers.base_changes import change_base
from ....layers.base_layer import BaseTunerLayer
from ....layers.new_tensors import draw_
from ....utils.computed_weights import find_computed_weight
from ....utils.error import PeftValueError
from ....utils.progress import advance
from ....utils.quantization_utils import resolve_quantization_backend
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..maths import without_smallest
from ..starts import Start, changes_base
from ..whole_weight import OnWholeWeight
from .base import LoraVariant
from .registry import register_variant


# attribute of a layer: how many of the smallest singular components its base weight has lost
_LOST = "singular_components_lost"


@register_variant("kasa_config")
class Kasa(LoraVariant):
    """
    KaSA: W0 + scaling * B diag(d) A, with trained singular values d, and W0 the weight without its r smallest ones.

    What is lost depends on the weight and the rank only, so a checkpoint need not hold it: loading an adapter takes
    the same from the same base model. Nothing brings it back but loading the base model anew.
    """

    name = "KaSA (kasa_config)"
    has_room = False
    adds_delta = True

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.settings = config.kasa_config

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is a linear one that keeps its weight as (out, in)."""
        return isinstance(layer.get_base_layer(), nn.Linear) and not isinstance(layer, OnWholeWeight)

    @classmethod
    def changes_base(cls) -> bool:
        """It does: the smallest singular components go."""
        return True

    @classmethod
    def check_beside(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """
        Refuse other adapters, which would stand on a weight that is not the base model's.

        Raises:
            PeftValueError: in that case.
        """
        apart = [name for name, other in others.items() if not getattr(other, cls.field, None)]
        if apart:
            raise PeftValueError(
                f"{cls.name} takes something out of the base weights, so that adapters without it "
                f"({', '.join(map(repr, apart))}) would compute something else in the same model; load the base model "
                "a second time for them"
            )

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Say what stands against taking components out of a weight; see `LoraVariant.refusal`."""
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Linear) or config.fan_in_fan_out or weight is None:
            return PeftValueError(
                f"{cls.name} works for nn.Linear only, found {type(base).__name__}; narrow the targets"
            )
        if changes_base(config.init_lora_weights):
            return PeftValueError(
                f"{cls.name} and init_lora_weights={config.init_lora_weights!r} both take something out of the base "
                "weight; use init_lora_weights=True"
            )
        if resolve_quantization_backend(base) is not None or weight.dtype.itemsize < 2:
            return PeftValueError(
                f"{cls.name} changes the base weight, which is quantised here; use a model that is not"
            )
        if find_computed_weight(base, "weight") is not None:
            return PeftValueError(
                f"{cls.name} changes the base weight, which is computed anew in each forward pass; leave it out"
            )
        if weight.is_meta:
            return PeftValueError(f"{cls.name} reads the base weights, which are on the meta device; load them first")
        if rank >= min(weight.shape):
            return PeftValueError(
                f"{cls.name} takes r={rank} singular components out of a weight that has {min(weight.shape)}; use "
                f"r <= {min(weight.shape) - 1}, or rank_pattern for this layer"
            )
        if isinstance(layer, BaseTunerLayer) and layer.merged and rank > layer.__dict__.get(_LOST, 0):
            return PeftValueError(
                f"{cls.name} changes the base weight, into which adapters are merged; unmerge them first"
            )
        return None

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the singular values."""
        layer.container("lora_diag", nn.ParameterDict)[adapter] = layer.new_parameter(layer.r[adapter])

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start the factors, draw the singular values, and have the smallest components taken out of the weight."""
        start.start(layer, adapter)
        draw_(layer.lora_diag[adapter], layer.stored_weight(), torch.Tensor.normal_)
        if layer.r[adapter] > layer.__dict__.get(_LOST, 0):
            change_base((id(layer), _LOST, adapter), lambda: _take_out_smallest(layer, layer.r[adapter]))

    def written_out(self, layer: LowRankLayer, adapter: str, name: str, factor: torch.Tensor) -> torch.Tensor:
        """Multiply the rows of A by the singular values."""
        return factor * layer.lora_diag[adapter].unsqueeze(1) if name == "lora_A" else factor

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B diag(d) A x."""
        hidden = layer.lora_A[adapter](layer.prepared_input(adapter, x))
        return layer.output_of(adapter, hidden * (layer.lora_diag[adapter] * layer.scaling[adapter]))

    def penalty(self, layer: LowRankLayer, adapter: str) -> torch.Tensor:
        """
        Compute what keeps the singular values small, and the factors orthogonal; in float32.

        Args:
            layer: the layer.
            adapter: name.
        """
        a, b = (factor.float() for factor in layer.factor_weights(adapter))
        one = torch.eye(len(a), device=a.device)
        apart = torch.linalg.matrix_norm(b.T @ b - one) + torch.linalg.matrix_norm(a @ a.T - one)
        return self.settings.beta * layer.lora_diag[adapter].float().square().sum() + self.settings.gamma * apart


@torch.no_grad()
def _take_out_smallest(layer: LowRankLayer, count: int) -> None:
    """Take singular components out of a base weight, unless as many are gone; it stays the same parameter."""
    if count > layer.__dict__.get(_LOST, 0):
        weight = layer.get_base_weight()
        weight.copy_(without_smallest(weight, count))
        layer.__dict__[_LOST] = count
    advance()
