# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The prefix of prefix tuning."""

import torch
from torch import nn

from ...prompts.encoder import BasePromptEncoder
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from .config import PrefixTuningConfig


class PrefixEncoder(BasePromptEncoder):
    """
    Keys and values of virtual tokens for every layer (Li and Liang 2021, arXiv:2101.00190).

    With `prefix_projection`, a small table and a network compute them while they are trained. A checkpoint holds what
    comes out, so an adapter that was loaded has the large table alone.

    Args:
        config: a complete config. `token_dim` is the width of a layer's keys.

    Attributes:
        embedding: (tokens, layers * 2 * token_dim) keys and values; with the network, (tokens, token_dim).
        transform: the network.

    Raises:
        PeftValueError: for unknown `init_weights`.

    Example:

        >>> import torch
        >>> from peft import PrefixEncoder, PrefixTuningConfig
        >>> config = PrefixTuningConfig(num_virtual_tokens=3, token_dim=8, num_layers=2)
        >>> PrefixEncoder(config)(torch.arange(3)).shape
        torch.Size([3, 32])
    """

    network_names = ("transform",)
    fills_cache = True

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        width, out = config.token_dim, config.num_layers * 2 * config.token_dim
        if config.init_weights and config.init_weights != "zero":
            raise PeftValueError(f"init_weights={config.init_weights!r} is not known; use 'zero' or leave it out")
        if config.prefix_projection and not config.inference_mode:
            hidden = config.encoder_hidden_size or width
            self.embedding = nn.Embedding(config.num_virtual_tokens, width)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))
            last = self.transform[-1]
        else:
            self.embedding = last = nn.Embedding(config.num_virtual_tokens, out)
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """
        Replace keys and values by given ones.

        Args:
            prompt_embeddings: (tokens, layers * 2 * token_dim).

        Raises:
            PeftValueError: if the shape is another one, or a network computes the prefix.
        """
        if self.is_computed:
            raise PeftValueError("with prefix_projection=True a network computes the prefix; it cannot be replaced")
        if prompt_embeddings.shape != self.embedding.weight.shape:
            found, expected = tuple(prompt_embeddings.shape), tuple(self.embedding.weight.shape)
            raise PeftValueError(f"prompt_embeddings has shape {found}, expected {expected}")
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """
        Compute keys and values.

        Args:
            prefix: (...) positions in the prefix.

        Returns:
            (..., layers * 2 * token_dim).
        """
        values = self.embedding(prefix)
        return self.transform(values) if self.is_computed else values


__getattr__ = old_names(__name__)
