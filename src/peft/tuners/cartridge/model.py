# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The keys and values of a cartridge."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from ...prompts.encoder import BasePromptEncoder
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from .config import CartridgeConfig


class CartridgeEncoder(BasePromptEncoder):
    """
    Keys and values of virtual tokens for every layer, the first ones frozen (Eyuboglu et al. 2025, arXiv:2506.06266).

    Args:
        config: a complete config. `token_dim` is the width of a layer's keys.

    Attributes:
        frozen_embedding: (frozen tokens, layers * 2 * token_dim), if there are any.
        trainable_embedding: (other tokens, layers * 2 * token_dim).
        num_frozen_tokens: how many are frozen.
        num_trainable_tokens: how many are not.

    Raises:
        PeftValueError: if more tokens are frozen than there are.

    Example:

        >>> import torch
        >>> from peft import CartridgeConfig, CartridgeEncoder
        >>> encoder = CartridgeEncoder(CartridgeConfig(num_virtual_tokens=3, token_dim=8, num_layers=2))
        >>> encoder(torch.arange(3)).shape, encoder.trainable_embedding.shape
        (torch.Size([3, 32]), torch.Size([2, 32]))
    """

    fills_cache = True
    frozen_names = ("frozen_embedding",)

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__()
        tokens, frozen = config.num_virtual_tokens, config.num_frozen_tokens
        if not 0 <= frozen <= tokens:
            raise PeftValueError(f"num_frozen_tokens must be from 0 to num_virtual_tokens={tokens}, found {frozen}")
        self.num_frozen_tokens, self.num_trainable_tokens = frozen, tokens - frozen
        width = config.num_layers * 2 * config.token_dim
        if frozen:
            self.frozen_embedding = nn.Parameter(torch.empty(frozen, width), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.empty(tokens - frozen, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with random numbers."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @property
    def weight(self) -> torch.Tensor:
        """Keys and values of all tokens, (tokens, layers * 2 * token_dim)."""
        return torch.cat([getattr(self, name) for name in self.names])

    @property
    def embedding(self) -> SimpleNamespace:
        """The same as an attribute `weight`, as other prefixes have it."""
        return SimpleNamespace(weight=self.weight)

    def indices(self) -> torch.Tensor:
        """Give the positions of the prefix, (tokens,)."""
        tokens = self.num_frozen_tokens + self.num_trainable_tokens
        return torch.arange(tokens, device=self.trainable_embedding.device)

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """
        Replace keys and values by given ones.

        Args:
            prompt_embeddings: (tokens, layers * 2 * token_dim).

        Raises:
            PeftValueError: if the shape is another one.
        """
        found, expected = tuple(prompt_embeddings.shape), tuple(self.weight.shape)
        if found != expected:
            raise PeftValueError(f"prompt_embeddings has shape {found}, expected {expected}")
        with torch.no_grad():
            for name, part in zip(self.names, self.split(prompt_embeddings), strict=True):
                getattr(self, name).copy_(part)

    def forward(self, prefix_tokens: torch.Tensor) -> torch.Tensor:
        """
        Look keys and values up.

        Args:
            prefix_tokens: (...) positions in the prefix.

        Returns:
            (..., layers * 2 * token_dim).
        """
        return F.embedding(prefix_tokens, self.weight)

    # ------------------------------------------------------------------------------------------------- checkpoints
    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that `join` takes."""
        return ("frozen_embedding", "trainable_embedding") if self.num_frozen_tokens else ("trainable_embedding",)

    def saved_form(self) -> "CartridgeEncoder":
        """Say that a checkpoint holds the rows of all tokens."""
        return self

    def join(self, *parts: torch.Tensor) -> torch.Tensor:
        """Give what stands in a checkpoint; see `JoinedForm`."""
        return torch.cat(parts)

    def split(self, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tell frozen rows from others; see `JoinedForm`."""
        if prompt.dim() == 0:
            return (prompt,) * len(self.names)
        return (prompt[: self.num_frozen_tokens], prompt[self.num_frozen_tokens :])[-len(self.names) :]


__getattr__ = old_names(__name__)
