# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of multitask prompt tuning."""

from dataclasses import dataclass
from enum import Enum

from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names
from ..prompt_tuning.config import PromptTuningConfig


class MultitaskPromptTuningInit(str, Enum):
    """How prompt and task matrices start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """
    Config of multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861); see `PromptTuningConfig` for more fields.

    Args:
        prompt_tuning_init: how the prompt starts: "RANDOM" numbers; "TEXT" for the embeddings of a text; or from
            another adapter of this method: its shared prompt with the mean of its tasks ("AVERAGE_SOURCE_TASKS"), with
            one of them ("EXACT_SOURCE_TASK"), or alone ("ONLY_SOURCE_SHARED").
        prompt_tuning_init_state_dict_path: folder or file of that adapter.
        prompt_tuning_init_task: which task to start from, counted from 0.
        num_ranks: rank of the matrix of a task.
        num_tasks: number of tasks.

    Example:

        >>> from peft import MultitaskPromptTuningConfig
        >>> config = MultitaskPromptTuningConfig(num_virtual_tokens=8, num_tasks=3, task_type="SEQ_2_SEQ_LM")
        >>> config.num_ranks
        1
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = option(
        MultitaskPromptTuningInit.RANDOM, "How prompt and task matrices start."
    )
    prompt_tuning_init_state_dict_path: str | None = option(None, "Folder or file of the adapter to start from.")
    prompt_tuning_init_task: int | None = option(0, "Task of that adapter to start from.")
    num_ranks: int | None = option(1, "Rank of the matrix of a task.")
    num_tasks: int | None = option(1, "Number of tasks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING


__getattr__ = old_names(__name__)
