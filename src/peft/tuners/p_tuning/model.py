# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The prompt of P-tuning."""

import torch
from torch import nn

from ...prompts.encoder import BasePromptEncoder
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from .config import PromptEncoderConfig, PromptEncoderReparameterizationType


MLP_LAYERS = 2


class PromptEncoder(BasePromptEncoder):
    """
    A table of embeddings and, while it is trained, the network behind it (Liu et al. 2021, arXiv:2103.10385).

    A checkpoint holds the prompt that the network computes, so an adapter that was loaded has the table alone.

    Args:
        config: a complete config.

    Attributes:
        embedding: (tokens, width) the table.
        lstm_head: bidirectional LSTM, if the config asks for one.
        mlp_head: the layers after it, or alone.

    Raises:
        PeftValueError: for an unknown kind of network.

    Example:

        >>> import torch
        >>> from peft import PromptEncoder, PromptEncoderConfig
        >>> config = PromptEncoderConfig(
        ...     num_virtual_tokens=3, token_dim=8, encoder_hidden_size=16, num_transformer_submodules=1
        ... )
        >>> PromptEncoder(config)(torch.arange(3)).shape
        torch.Size([3, 8])
    """

    network_names = ("lstm_head", "mlp_head")

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, width)
        kind = config.encoder_reparameterization_type
        if kind not in list(PromptEncoderReparameterizationType):
            known = ", ".join(member.value for member in PromptEncoderReparameterizationType)
            raise PeftValueError(f"encoder_reparameterization_type={kind!r} is not known; choose one of {known}")
        if config.inference_mode:
            return
        if kind == PromptEncoderReparameterizationType.LSTM:
            layers = config.encoder_num_layers
            self.lstm_head = nn.LSTM(
                width, hidden, layers, dropout=config.encoder_dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            if config.encoder_num_layers != MLP_LAYERS:
                warn(f"encoder_num_layers={config.encoder_num_layers} has no effect: an MLP has {MLP_LAYERS} of them")
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Compute the prompt.

        Args:
            indices: (..., tokens) positions in the prompt. The LSTM reads all of them in their order.

        Returns:
            (..., tokens, width) embeddings.
        """
        values = self.embedding(indices)
        if "lstm_head" in self._modules:
            values = self.lstm_head(values)[0]
        return self.mlp_head(values) if self.is_computed else values


__getattr__ = old_names(__name__)
