# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the prompts of all methods have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..layers.saved_form import JoinedForm


class BasePromptEncoder(nn.Module):
    """
    The prompt of one adapter.

    A method subclasses it, makes the table `embedding` in its constructor, and computes the prompt in `forward`.

    Attributes:
        embedding: (tokens, width) the table that the prompt is computed from.
        network_names: modules between the table and the prompt. A checkpoint holds the finished prompt instead.
        saved_names: further tensors that stand in a checkpoint, under these names.
        fills_cache: the prompt is keys and values for each layer, not embeddings.
        prompts_decoder: with encoder-decoder models, the decoder gets the second half of the prompt.
        needs_task_ids: the prompt depends on the task of each sample.
        frozen_names: parameters that are never trained.
        has_loss: the method has a loss of its own, which `add_loss` computes in the place of the base model's.
        loss_inputs: inputs that this loss takes, which the base model does not know.
    """

    network_names: tuple[str, ...] = ()
    saved_names: tuple[str, ...] = ()
    fills_cache: bool = False
    prompts_decoder: bool = False
    needs_task_ids: bool = False
    frozen_names: tuple[str, ...] = ()
    has_loss: bool = False
    loss_inputs: tuple[str, ...] = ()

    embedding: nn.Embedding

    @classmethod
    def for_model(cls, config: Any, word_embeddings: nn.Module) -> "BasePromptEncoder":
        """Make the prompt of a new adapter; methods whose prompts start from the base's embedding override it."""
        return cls(config)

    def indices(self) -> torch.Tensor:
        """Give the positions of the prompt, (tokens,)."""
        return torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)

    def saved_form(self) -> JoinedForm | None:
        """Say how a checkpoint's prompt follows from several parameters; None if it is the table."""
        return None

    def add_loss(self, outputs: Any, labels: torch.Tensor, **inputs: Any) -> Any:
        """
        Compute the loss of a method that has one of its own.

        Args:
            outputs: what the base model gives for the lengthened input, without a loss.
            labels: (batch, length) as the caller gave them.
            inputs: those of `loss_inputs` that were given.

        Returns:
            The outputs with the loss.
        """
        raise NotImplementedError

    @property
    def is_computed(self) -> bool:
        """Whether there is a network between the table and the prompt."""
        return any(name in self._modules for name in self.network_names)

    def finished_table(self, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """
        Give the table as it stands in a checkpoint, after the network.

        Args:
            tensors: values to compute with, by name; the module's own if left out.

        Returns:
            (tokens, width).
        """
        tensors = dict(self.named_parameters()) if tensors is None else tensors
        form = self.saved_form()
        if form is not None:
            return form.join(*(tensors[name] for name in form.names))
        if not self.is_computed:
            return tensors["embedding.weight"]
        training = self.training
        self.eval()  # no dropout
        try:
            with torch.no_grad():
                return torch.func.functional_call(self, dict(tensors), (self.indices().unsqueeze(0),))[0]
        finally:
            self.train(training)

    def replace_network(self, table: torch.Tensor) -> None:
        """Put a finished table in the place of the network and what it computes from."""
        trainable = self.embedding.weight.requires_grad
        for name in self.network_names:
            self._modules.pop(name, None)
        self.embedding = nn.Embedding.from_pretrained(table.clone(), freeze=not trainable)
