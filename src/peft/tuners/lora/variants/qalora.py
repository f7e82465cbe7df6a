# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
QA-LoRA: factor A meets groups of neighbouring inputs, so that the delta is the same within a group.

Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", 2023, arXiv:2309.14717.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ....anatomy.kinds import features
from ....layers.new_tensors import draw_
from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..factors import Factor
from ..low_rank import LowRankLayer
from ..maths import uniform_by_fan_in
from ..starts import Start
from .base import OwnStart
from .registry import register_variant


@register_variant("use_qalora")
class QaLora(OwnStart):
    """
    QA-LoRA: W x + scaling * B A P x, where P x has in / G entries: in / G times the mean of each group of G inputs.

    The delta is the same for all inputs of a group, so zero points of weights that are quantised in such groups can
    take it in.
    """

    name = "QA-LoRA (use_qalora)"
    adds_delta = True

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.group_size = config.qalora_group_size

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Say what stands against groups of inputs; see `LoraVariant.refusal`."""
        refusal = super().refusal(config, target, base, layer, rank)
        if refusal is not None:
            return refusal
        size, in_features = config.qalora_group_size, features(base)[0]
        if size < 1 or (in_features or size) % size:
            return PeftValueError(
                f"qalora_group_size={size} does not divide the {in_features} inputs of the layer; use a number that "
                "does, the group size that the weight is quantised with if it is"
            )
        return None

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Note the size of groups among the layer's settings."""
        layer.setting("qalora_group_size")[adapter] = self.group_size

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start plain factors, so that what is drawn is what LoRA draws, and then factor A by itself."""
        start.start(layer, adapter)
        a = layer.lora_A[adapter]
        if a.weight.shape[1] != self._groups(layer):
            layer.lora_A[adapter] = a = Factor(layer.new_parameter(len(a.weight), self._groups(layer)))
        draw_(a.weight, layer.stored_weight(), uniform_by_fan_in)

    def _groups(self, layer: LowRankLayer) -> int:
        return layer.in_features // self.group_size

    def written_out(self, layer: LowRankLayer, adapter: str, name: str, factor: torch.Tensor) -> torch.Tensor:
        """Give each input the column of its group."""
        if name != "lora_A":
            return factor
        return factor.repeat_interleave(self.group_size, dim=1) * (self._groups(layer) / self.group_size)

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A P x."""
        groups = layer.prepared_input(adapter, x).unflatten(-1, (-1, self.group_size)).mean(-1)
        hidden = layer.lora_A[adapter](groups) * (self._groups(layer) * layer.scaling[adapter])
        return layer.output_of(adapter, hidden)

    def prepare_to_load(self, layer: LowRankLayer, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Become plain LoRA where a checkpoint has plain factors.

        Release 0.21.2 knows groups on GPTQ layers only. On others it trains plain LoRA, and its files say QA-LoRA all
        the same.
        """
        ending = f"{self.target}.lora_A.weight"
        found = [tensor for key, tensor in tensors.items() if key == ending or key.endswith(f".{ending}")]
        a = layer.lora_A[adapter].weight
        if len(found) == 1 and found[0].shape == (len(a), layer.in_features) != a.shape:
            whole = layer.new_parameter(*found[0].shape).requires_grad_(a.requires_grad)
            layer.lora_A[adapter] = Factor(whole)
            del layer.variants[adapter], layer.qalora_group_size[adapter]
