# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Multitask prompt tuning: one prompt for all tasks, scaled entry by entry by a low-rank matrix per task.

Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", 2023, arXiv:2303.02861.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "MULTITASK_PROMPT_TUNING",
    "peft.tuners.multitask_prompt_tuning.config:MultitaskPromptTuningConfig",
    "peft.tuners.multitask_prompt_tuning.model:MultitaskPromptEmbedding",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"], ".model": ["MultitaskPromptEmbedding"]},
)
