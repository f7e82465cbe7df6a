# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The prompts of multitask prompt tuning."""

import os

import torch
from safetensors.torch import load_file
from torch import nn

from ...checkpoints.read_file import load_peft_weights, torch_load
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..prompt_tuning.model import PromptEmbedding
from .config import MultitaskPromptTuningConfig, MultitaskPromptTuningInit


class MultitaskPromptEmbedding(PromptEmbedding):
    """
    A prompt that all tasks share, scaled entry by entry by a matrix per task (Wang et al. 2023, arXiv:2303.02861).

    The prompt of task k is P * (U_k V_k), with U_k (tokens, ranks) and V_k (ranks, width).

    Args:
        config: a complete config.
        word_embeddings: the base model's embedding, which the shared prompt may start from.

    Attributes:
        embedding: (tokens, width) the shared prompt.
        prefix_task_cols: (tasks, tokens, ranks) the matrices U.
        prefix_task_rows: (tasks, ranks, width) the matrices V.

    Raises:
        PeftValueError: for an unknown init, or if what it starts from is missing or does not fit.

    Example:

        >>> import torch
        >>> from peft import MultitaskPromptTuningConfig
        >>> from peft.tuners import MultitaskPromptEmbedding
        >>> config = MultitaskPromptTuningConfig(
        ...     num_virtual_tokens=3, token_dim=8, num_transformer_submodules=1, num_tasks=2
        ... )
        >>> prompt = MultitaskPromptEmbedding(config, torch.nn.Embedding(20, 8))
        >>> prompt(torch.arange(3).expand(4, -1), task_ids=torch.tensor([0, 1, 1, 0])).shape
        torch.Size([4, 3, 8])
    """

    saved_names = ("prefix_task_cols", "prefix_task_rows")
    prompts_decoder = True
    needs_task_ids = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)
        tokens, tasks, ranks = self.embedding.num_embeddings, config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, tokens, ranks))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, config.token_dim))
        for matrix in (self.prefix_task_cols, self.prefix_task_rows):
            nn.init.normal_(matrix, std=0.02)
        if config.prompt_tuning_init in _FROM_SOURCE and not config.inference_mode and not matrix.is_meta:
            self._start_from_source(config)

    def _start(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module) -> None:
        if config.prompt_tuning_init not in _FROM_SOURCE:
            super()._start(config, word_embeddings)

    def _start_from_source(self, config: MultitaskPromptTuningConfig) -> None:
        """Take over the shared prompt of another adapter, and what its tasks have learned."""
        source = _read_source(config)
        start = {"embedding.weight": source["prompt_embeddings"]}
        if config.prompt_tuning_init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            for name in self.saved_names:
                matrices = source[name]
                if config.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                    chosen = matrices.mean(0)
                elif 0 <= config.prompt_tuning_init_task < len(matrices):
                    chosen = matrices[config.prompt_tuning_init_task]
                else:
                    raise PeftValueError(
                        f"prompt_tuning_init_task={config.prompt_tuning_init_task}, but the adapter to start from has "
                        f"{len(matrices)} tasks"
                    )
                start[name] = chosen.expand(config.num_tasks, -1, -1)
        own = dict(self.named_parameters())
        for name, value in start.items():
            if value.shape != own[name].shape:
                raise PeftValueError(
                    f"the adapter to start from has a {name} of shape {tuple(value.shape)}, expected "
                    f"{tuple(own[name].shape)}; num_virtual_tokens, num_ranks and the base model have to be the same"
                )
        with torch.no_grad():
            for name, value in start.items():
                own[name].copy_(value)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
        """
        Compute prompts of tasks.

        Args:
            indices: (batch, tokens) all positions of the prompt.
            task_ids: (batch,) tasks, counted from 0.

        Returns:
            (batch, tokens, width) embeddings.

        Raises:
            PeftValueError: without `task_ids`.
        """
        if task_ids is None:
            raise PeftValueError("multitask prompt tuning needs task_ids: the task of each sample, counted from 0")
        scale = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return self.embedding(indices) * scale


_FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


def _read_source(config: MultitaskPromptTuningConfig) -> dict[str, torch.Tensor]:
    path = config.prompt_tuning_init_state_dict_path
    if path is None:
        init = MultitaskPromptTuningInit(config.prompt_tuning_init).value
        raise PeftValueError(f"prompt_tuning_init={init!r} needs prompt_tuning_init_state_dict_path")
    if os.path.isdir(path):
        source = load_peft_weights(path, device="cpu")
    else:
        source = load_file(path) if path.endswith(".safetensors") else torch_load(path, map_location="cpu")
    missing = {"prompt_embeddings", *MultitaskPromptEmbedding.saved_names} - set(source)
    if missing:
        raise PeftValueError(f"{path!r} lacks {', '.join(sorted(missing))}; it is no adapter of this method")
    return source


__getattr__ = old_names(__name__)
