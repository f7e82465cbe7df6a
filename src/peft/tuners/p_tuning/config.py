# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of P-tuning."""

from dataclasses import dataclass
from enum import Enum

from ...config import PromptLearningConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


class PromptEncoderReparameterizationType(str, Enum):
    """Kind of the network that computes the prompt while it is trained."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """
    Config of P-tuning (Liu et al. 2021, arXiv:2103.10385); see `PromptLearningConfig` for further fields.

    Args:
        encoder_reparameterization_type: network that computes the prompt, "MLP" or "LSTM".
        encoder_hidden_size: width of its hidden layers; that of the embedding if left out.
        encoder_num_layers: number of LSTM layers. An MLP always has two hidden layers.
        encoder_dropout: probability of dropout between LSTM layers, 0 to 1.

    Example:

        >>> from peft import PromptEncoderConfig
        >>> config = PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=32, task_type="SEQ_CLS")
        >>> config.encoder_reparameterization_type.value
        'MLP'
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = option(
        PromptEncoderReparameterizationType.MLP, "Network that computes the prompt."
    )
    encoder_hidden_size: int | None = option(None, "Width of its hidden layers.")
    encoder_num_layers: int = option(2, "Number of LSTM layers.")
    encoder_dropout: float = option(0.0, "Probability of dropout between LSTM layers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING


__getattr__ = old_names(__name__)
