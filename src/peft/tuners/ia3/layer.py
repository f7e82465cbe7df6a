# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3's layers: one vector of factors each, for the inputs or the outputs."""

import torch
from torch import nn

from ...layers.activation import ActivationLayer
from .config import IA3Config


class IA3Layer(ActivationLayer):
    """
    What IA3's layers share: W (l * x) for feedforward layers, l * (W x + b) for the others.

    Attributes:
        ia3_l: factors by adapter name, in a shape that says which side they scale.
        is_feedforward: by adapter name, whether it is the inputs that are scaled.
    """

    adapter_layer_names = ("ia3_l",)
    other_param_names = ("is_feedforward",)

    def make_adapter(self, adapter_name: str, config: IA3Config, is_feedforward: bool = False) -> None:
        """
        Make an adapter's factors.

        Args:
            adapter_name: name.
            config: the adapter's config.
            is_feedforward: scale the inputs.
        """
        self.is_feedforward[adapter_name] = is_feedforward
        self.ia3_l[adapter_name] = self.new_parameter(*self.factors_shape(is_feedforward))

    def factors_shape(self, of_inputs: bool) -> tuple[int, ...]:
        """Give the shape of the factors: (1, in_features) or (out_features, 1), as checkpoints have them."""
        return (1, self.in_features) if of_inputs else (self.out_features, 1)

    def reset_adapter(self, adapter_name: str, config: IA3Config) -> None:
        """Start with factors of 1, or at random."""
        factors = self.ia3_l[adapter_name]
        nn.init.ones_(factors) if config.init_ia3_weights else nn.init.normal_(factors)

    def feature_scale(self, adapter: str) -> torch.Tensor:
        """Give the factors, (in_features,) or (out_features,)."""
        return self.ia3_l[adapter].flatten()

    def scales_input(self, adapter: str) -> bool:
        """Say whether the factors belong to the input."""
        return self.is_feedforward[adapter]


class Linear(IA3Layer, nn.Module):
    """IA3 on `nn.Linear` and on the `Conv1D` of transformers."""


class _ConvNd(IA3Layer, nn.Module):
    """IA3 on convolutions: a factor per channel."""

    def factors_shape(self, of_inputs: bool) -> tuple[int, ...]:
        """Give the shape of the factors: (1, channels, 1, ...)."""
        channels = self.in_features if of_inputs else self.out_features
        return (1, channels, *[1] * len(self.get_base_layer().kernel_size))


class Conv2d(_ConvNd):
    """IA3 on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """IA3 on `nn.Conv3d`."""
