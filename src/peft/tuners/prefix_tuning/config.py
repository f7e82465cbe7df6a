# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of prefix tuning."""

from dataclasses import dataclass
from typing import Literal

from ...config import PromptLearningConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """
    Config of prefix tuning (Li and Liang 2021, arXiv:2101.00190); see `PromptLearningConfig` for further fields.

    Args:
        init_weights: "zero" to start from keys and values of zero; random ones if left out.
        encoder_hidden_size: width of the hidden layer of the network that computes the prefix; that of keys if left
            out.
        prefix_projection: compute the prefix by a network while it is trained.

    Example:

        >>> from peft import PrefixTuningConfig
        >>> PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").prefix_projection
        False
    """

    init_weights: Literal["zero"] | None = option(None, "How keys and values start.")
    encoder_hidden_size: int | None = option(None, "Width of the network's hidden layer.")
    prefix_projection: bool = option(False, "Compute the prefix by a network in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING


__getattr__ = old_names(__name__)
