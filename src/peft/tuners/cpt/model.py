# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The prompt of context-aware prompt tuning."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import nn

from ...layers.new_tensors import on_meta
from ...prompts.encoder import BasePromptEncoder
from ...utils.error import PeftValueError
from ...utils.integrations import gather_params_ctx
from ...utils.old_names import old_names
from .config import CPTConfig
from .loss import weighted_loss, with_context


_NO_MOVE = 1e-10
# how much further than its ball a saved token may be, since sums are rounded
_ROUNDING = 1e-6


class CPTEmbedding(BasePromptEncoder):
    """
    Embeddings of a context, and how far each is moved, within a ball of its own (Blau et al. 2024, arXiv:2410.17222).

    Args:
        config: a complete config.
        word_embeddings: the base model's embedding, which gives the context.

    Attributes:
        embedding: (tokens, width) the context, frozen.
        delta_embedding: (tokens, width) how far its tokens are moved.

    Raises:
        PeftValueError: for tokens that the embedding does not have.

    Example:

        >>> import torch
        >>> from peft import CPTConfig, CPTEmbedding
        >>> config = CPTConfig(cpt_token_ids=[5, 6], cpt_tokens_type_mask=[2, 4], task_type="CAUSAL_LM")
        >>> config.token_dim = 8
        >>> words = torch.nn.Embedding(20, 8)
        >>> torch.equal(CPTEmbedding(config, words)(torch.arange(2)), words.weight[5:7])
        True
    """

    frozen_names = ("embedding.weight",)
    has_loss = True
    loss_inputs = ("input_type_mask",)

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
        self.delta_embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        self.embedding.weight.requires_grad_(False)
        # the checkpoint that is loaded brings the context along
        if not config.inference_mode and not on_meta():
            self._read_context(word_embeddings)

    @classmethod
    def for_model(cls, config: CPTConfig, word_embeddings: nn.Module) -> "CPTEmbedding":
        """Make the prompt of a new adapter."""
        return cls(config, word_embeddings)

    def _read_context(self, word_embeddings: nn.Module) -> None:
        rows, ids = word_embeddings.weight.shape[0], self.config.cpt_token_ids
        if min(ids) < 0 or max(ids) >= rows:
            raise PeftValueError(f"cpt_token_ids has to hold numbers from 0 to {rows - 1}, found {ids}")
        with torch.no_grad(), gather_params_ctx(word_embeddings.parameters()):
            tokens = torch.tensor(ids, device=word_embeddings.weight.device)
            self.embedding.weight.copy_(word_embeddings(tokens).float())

    def get_epsilon(self) -> torch.Tensor:
        """Give the radius of each token's ball, (tokens,)."""
        types, config = self._types(), self.config
        epsilon = torch.where(types % 2 == 1, config.opt_projection_format_epsilon, config.opt_projection_epsilon)
        radius = epsilon * sqrt(self.config.token_dim / 2048)
        return torch.where((types > 0) & (types % 4 != 0), radius, _NO_MOVE)

    def get_projection(self) -> torch.Tensor:
        """Give how far tokens are moved, (tokens, width), as far as their balls allow."""
        return self._within_balls(self.delta_embedding.weight)

    def set_updated_tokens(self) -> None:
        """Do nothing: labels get no gradient in `forward`; kept for callers of the released package."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Compute the prompt. In training, what has left its ball is put back into it first.

        Args:
            indices: (...) positions in the prompt.

        Returns:
            (..., width) embeddings.
        """
        delta = self.delta_embedding.weight
        projected = self.get_projection()
        if self.training:
            with torch.no_grad():
                delta.copy_(projected)
        if torch.is_grad_enabled():
            # the gradient is that of the sum, as if there were no balls; labels and what has no type get none
            fixed = (self._types() % 4 == 0)[:, None]
            projected = projected + torch.where(fixed, 0.0, delta - delta.detach())
        return (self.embedding.weight + projected)[indices]

    def _types(self) -> torch.Tensor:
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.embedding.weight.device)

    @torch.no_grad()
    def _within_balls(self, delta: torch.Tensor) -> torch.Tensor:
        radius, norm = self.get_epsilon().to(delta.dtype), delta.norm(dim=1)
        greatest = torch.maximum(norm, radius).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * (radius / greatest)[:, None]

    # ------------------------------------------------------------------------------------------------- checkpoints
    # of the tensors that `join` takes
    names = ("embedding.weight", "delta_embedding.weight")

    def saved_form(self) -> "CPTEmbedding":
        """Say that a checkpoint holds the sum of context and moves."""
        return self

    def join(self, context: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Give what stands in a checkpoint; see `JoinedForm`."""
        return context + self._within_balls(delta)

    def split(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tell the context in a checkpoint from its moves; see `JoinedForm`.

        If the prompt lies in the balls around the present context, that is where it comes from, and training can go
        on. Otherwise it becomes the context itself.
        """
        context = self.embedding.weight
        if prompt.shape != context.shape:
            return prompt, prompt
        if not (context.is_meta or prompt.is_meta):
            delta = prompt.to(context) - context.detach()
            allowed = self.get_epsilon() + _ROUNDING * context.norm(dim=1)
            if bool((delta.norm(dim=1) <= allowed).all()):
                return context.detach(), delta
        return prompt, torch.zeros_like(prompt)

    # -------------------------------------------------------------------------------------------------------- loss
    def add_loss(self, outputs: Any, labels: torch.Tensor, input_type_mask: torch.Tensor | None = None) -> Any:
        """
        Compute the loss over the labels of context and input.

        Args:
            outputs: what the base model gives.
            labels: (batch, length) token ids, -100 at positions without a loss.
            input_type_mask: (batch, length) types of the input's tokens, as those of a first example; if left out, all
                are labels.
        """
        types = torch.full_like(labels, 4) if input_type_mask is None else input_type_mask.to(labels)
        return self.calculate_loss(outputs, *with_context(labels, types, self.config), self.config)

    @staticmethod
    def calculate_loss(
        base_model_output: Any, labels: torch.Tensor, cpt_type_mask: torch.Tensor, config: CPTConfig
    ) -> Any:
        """
        Add the loss to the outputs of the base model.

        Args:
            base_model_output: an object with logits (batch, tokens + length, vocabulary), or a tuple of them and more.
            labels: (batch, tokens + length) token ids of context and input.
            cpt_type_mask: (batch, tokens + length) their types.
            config: which tells the weights.

        Returns:
            The outputs with the loss; a tuple begins with it.
        """
        is_tuple = isinstance(base_model_output, tuple)
        logits = base_model_output[0] if is_tuple else base_model_output.logits
        loss = weighted_loss(logits, labels, cpt_type_mask, config)
        if is_tuple:
            return (loss, *base_model_output)
        if isinstance(base_model_output, Mapping):
            return type(base_model_output)(**{**base_model_output, "loss": loss})
        base_model_output.loss = loss
        return base_model_output


__getattr__ = old_names(__name__)
