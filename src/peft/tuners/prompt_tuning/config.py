# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of prompt tuning."""

from dataclasses import dataclass
from enum import Enum

from ...config import PromptLearningConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


class PromptTuningInit(str, Enum):
    """How the prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """
    Config of prompt tuning (Lester et al. 2021, arXiv:2104.08691); see `PromptLearningConfig` for further fields.

    Args:
        prompt_tuning_init: how the prompt starts: "RANDOM" numbers, "SAMPLE_VOCAB" for embeddings of random tokens,
            "TEXT" for those of a text.
        prompt_tuning_init_text: that text. It is repeated or cut to the length of the prompt.
        tokenizer_name_or_path: tokenizer for the text.
        tokenizer_kwargs: arguments for loading the tokenizer.

    Raises:
        ValueError: if "TEXT" lacks the text or the tokenizer, or `tokenizer_kwargs` is given without "TEXT".

    Example:

        >>> from peft import PromptTuningConfig
        >>> PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").is_prompt_learning
        True
    """

    prompt_tuning_init: PromptTuningInit | str = option(PromptTuningInit.RANDOM, "How the prompt starts.")
    prompt_tuning_init_text: str | None = option(None, "Text that the prompt starts from.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer for that text.")
    tokenizer_kwargs: dict | None = option(None, "Arguments for loading the tokenizer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        starts_from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if starts_from_text and not getattr(self, name):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}")
        if self.tokenizer_kwargs and not starts_from_text:
            raise ValueError("tokenizer_kwargs has no effect without prompt_tuning_init='TEXT'; leave it out")


__getattr__ = old_names(__name__)
