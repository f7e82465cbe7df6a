# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
EVA: factor A from the components of a layer's inputs on some data.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170.
"""

from torch import nn

from ....anatomy.kinds import CONVOLUTIONS
from ....utils.error import PeftValueError
from .random import Neutral
from .registry import register_start


@register_start("eva")
class Eva(Neutral):
    """
    A start that `initialize_lora_eva_weights` completes, once the adapter is in the model; neutral until then.

    So it is for whatever that does not look at: embeddings, attention of torch, parameters.
    """

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """Say that convolutions have no rows of inputs; see `Start.refusal`."""
        if isinstance(base, CONVOLUTIONS):
            return PeftValueError(
                f"init_lora_weights='eva' looks at rows of inputs, which a {type(base).__name__} does not have; use "
                "True for an adapter with convolutions"
            )
        return None
