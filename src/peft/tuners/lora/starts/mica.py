# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
MiCA: factor B from the directions that the base weight hardly uses, and factor A alone trained.

Rüdiger, Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", 2026, arXiv:2604.01694.
"""

from ....anatomy.kinds import stores_weight_transposed
from ..low_rank import LowRankLayer
from ..maths import trailing_left_vectors
from .base_weight import ReadsBaseWeight
from .registry import register_start


@register_start("mica")
class Mica(ReadsBaseWeight):
    """B is the left singular vectors of the weight for its smallest singular values, and is not trained; A is zero."""

    keeps_output_factor = True

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Write both factors; nothing is computed for factors without storage.

        Raises:
            Exception: what `refusal` gives.
        """
        into, out = layer.factor_weights(adapter)
        if out.is_meta:
            return
        refusal = self.refusal(layer.get_base_layer(), layer.r[adapter], layer, adapter)
        if refusal is not None:
            raise refusal
        weight = layer.get_base_weight().detach()
        if layer.is_embedding or stores_weight_transposed(layer.get_base_layer()):
            weight = weight.T
        out.copy_(trailing_left_vectors(weight, layer.r[adapter]).to(weight.dtype))
        into.zero_()
