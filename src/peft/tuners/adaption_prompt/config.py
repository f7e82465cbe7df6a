# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of adaption prompt."""

from dataclasses import dataclass

from ...config import PeftConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """
    Config of adaption prompt (Zhang et al. 2023, arXiv:2303.16199).

    Args:
        target_modules: name of the attention modules; what the model type has, if left out.
        adapter_len: number of trained tokens for each attention module. It is needed.
        adapter_layers: how many attention modules are adapted, the last ones. It is needed.

    Example:

        >>> from peft import AdaptionPromptConfig
        >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=2, task_type="CAUSAL_LM").is_adaption_prompt
        True
    """

    target_modules: str | None = option(None, "Name of the attention modules.")
    adapter_len: int | None = option(None, "Number of trained tokens.")
    adapter_layers: int | None = option(None, "How many attention modules are adapted, the last ones.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return True


__getattr__ = old_names(__name__)
