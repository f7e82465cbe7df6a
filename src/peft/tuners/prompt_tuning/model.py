# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The prompt of prompt tuning."""

from typing import Any

import torch
from torch import nn

from ...layers.new_tensors import on_meta
from ...prompts.encoder import BasePromptEncoder
from ...utils.error import PeftValueError
from ...utils.integrations import gather_params_ctx
from ...utils.old_names import old_names
from .config import PromptTuningConfig, PromptTuningInit


class PromptEmbedding(BasePromptEncoder):
    """
    A table of embeddings, one row per virtual token (Lester et al. 2021, arXiv:2104.08691).

    Args:
        config: a complete config.
        word_embeddings: the base model's embedding, which the prompt may start from.

    Attributes:
        embedding: (tokens, width) the table.

    Raises:
        PeftValueError: for an unknown `prompt_tuning_init`.

    Example:

        >>> import torch
        >>> from peft import PromptEmbedding, PromptTuningConfig
        >>> config = PromptTuningConfig(
        ...     num_virtual_tokens=3, token_dim=8, num_transformer_submodules=1, prompt_tuning_init="SAMPLE_VOCAB"
        ... )
        >>> prompt = PromptEmbedding(config, torch.nn.Embedding(20, 8))
        >>> prompt(torch.arange(3)).shape
        torch.Size([3, 8])
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(tokens, config.token_dim)
        # what is loaded from a checkpoint, maybe without the tokenizer at hand, needs no start values
        if not config.inference_mode and not on_meta():
            self._start(config, word_embeddings)

    @classmethod
    def for_model(cls, config: PromptTuningConfig, word_embeddings: nn.Module) -> "PromptEmbedding":
        """Make the prompt of a new adapter."""
        return cls(config, word_embeddings)

    def _start(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        """Give the table the start values that the config asks for."""
        init, tokens = config.prompt_tuning_init, self.embedding.num_embeddings
        if init == PromptTuningInit.RANDOM:
            return
        if init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(word_embeddings.num_embeddings, (tokens,))
        elif init == PromptTuningInit.TEXT:
            ids = _text_ids(config, tokens)
        else:
            raise PeftValueError(
                f"prompt_tuning_init={getattr(init, 'value', init)!r} is not known to {type(self).__name__}"
            )
        with torch.no_grad(), gather_params_ctx(word_embeddings.parameters()):
            device = word_embeddings.weight.device
            self.embedding.weight.copy_(word_embeddings(ids.to(device)).float())

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Look the prompt up.

        Args:
            indices: (...) positions in the prompt.

        Returns:
            (..., width) embeddings.
        """
        return self.embedding(indices)


def _text_ids(config: PromptTuningConfig, tokens: int) -> torch.Tensor:
    """Turn the config's text into as many token ids as the prompt has: it is repeated or cut."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = config.tokenizer_kwargs or {}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise PeftValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens to start from")
    return torch.tensor((ids * -(-tokens // len(ids)))[:tokens])


__getattr__ = old_names(__name__)
