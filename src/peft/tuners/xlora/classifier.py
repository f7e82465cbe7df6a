# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The classifier of X-LoRA: from hidden states to how much each token gets of each expert."""

import torch
from torch import nn

from ...utils.error import PeftValueError
from .config import XLoraConfig


class TemperatureScaledSoftmax(nn.Module):
    """
    A softmax over the last dimension.

    Args:
        temperature: what is divided by first; the higher, the more even.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Give shares that sum to 1."""
        return torch.softmax(logits / self.temperature, dim=-1)


class XLoraClassifier(nn.Module):
    """
    Linear layers with ReLU and dropout between them.

    Args:
        config: says how many and how wide.
        n_classes: number of experts.
        n_layers: number of layers that have experts.
        device: of its parameters.
        dtype: of its parameters.

    Raises:
        PeftValueError: if there is no layer to be made.

    Example:

        >>> import torch
        >>> from peft import XLoraConfig
        >>> from peft.tuners.xlora.classifier import XLoraClassifier
        >>> classifier = XLoraClassifier(XLoraConfig(hidden_size=8, adapters={}), n_classes=2, n_layers=3)
        >>> classifier(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 3, 2])
    """

    def __init__(
        self,
        config: XLoraConfig,
        n_classes: int,
        n_layers: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.xlora_depth < 1:
            raise PeftValueError(f"xlora_depth counts the classifier's layers: at least 1, found {config.xlora_depth}")
        self.n_classes, self.n_layers, self.layerwise = n_classes, n_layers, config.layerwise_scalings
        self.softmax = TemperatureScaledSoftmax(config.softmax_temperature) if config.enable_softmax else nn.Identity()
        between = [config.xlora_size] * (config.xlora_depth - 1)
        sizes = [config.hidden_size, *between, n_classes * (n_layers if self.layerwise else 1)]
        layers: list[nn.Module] = []
        for number in range(config.xlora_depth):
            layers.append(nn.Linear(sizes[number], sizes[number + 1]).to(device, dtype))
            if number < config.xlora_depth - 1:
                layers.append(nn.ReLU())
                layers += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p > 0 else []
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Weigh the experts.

        Args:
            hidden_states: (batch, length, hidden_size)

        Returns:
            (batch, length, layers, experts)

        Raises:
            PeftValueError: if hidden states have another width.
        """
        first = self.layers[0]
        if hidden_states.shape[-1] != first.in_features:
            raise PeftValueError(
                f"hidden_size={first.in_features} of the X-LoRA config does not fit the model, whose hidden states "
                f"are {hidden_states.shape[-1]} wide"
            )
        logits = self.layers(hidden_states.to(first.weight.device, first.weight.dtype))
        if self.layerwise:
            return self.softmax(logits.unflatten(-1, (self.n_layers, self.n_classes)))
        return self.softmax(logits).unsqueeze(-2).expand(-1, -1, self.n_layers, -1)
