# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of cartridges."""

from dataclasses import dataclass

from ...config import PromptLearningConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """
    Config of cartridges (Eyuboglu et al. 2025, arXiv:2506.06266); see `PromptLearningConfig` for further fields.

    Args:
        num_frozen_tokens: how many of the virtual tokens, from the first one on, are not trained. One is frozen if
            left out: attention leans on the first token of a text, and training is unstable if that moves.

    Raises:
        ValueError: if it is negative or more than there are virtual tokens.

    Example:

        >>> from peft import CartridgeConfig
        >>> CartridgeConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").num_frozen_tokens
        1
    """

    num_frozen_tokens: int = option(1, "Number of virtual tokens that are not trained.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        tokens = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (tokens is not None and self.num_frozen_tokens > tokens):
            raise ValueError(
                f"num_frozen_tokens must be from 0 to num_virtual_tokens={tokens}, found {self.num_frozen_tokens}"
            )


__getattr__ = old_names(__name__)
