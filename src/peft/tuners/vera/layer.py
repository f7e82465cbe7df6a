# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VeRA's layer: two trained vectors around projections that all layers share."""

import torch
import torch.nn.functional as F
from torch import nn

from ...anatomy.kinds import stores_weight_transposed
from ...layers.additive import AdditiveLayer
from ...layers.shared_tensors import SharedBuffers
from ...utils.old_names import old_names
from .config import VeraConfig


class VeraLayer(AdditiveLayer):
    """
    What VeRA's layers share: W + diag(b) B diag(d) A.

    The shared projections fit the largest layer; a smaller one uses the first columns of A and the first rows of B.

    Attributes:
        vera_lambda_b: b (out_features,) by adapter name.
        vera_lambda_d: d (r,) by adapter name.
        vera_A: A (r, most inputs) by adapter name, one object for all layers.
        vera_B: B (most outputs, r) by adapter name, one object for all layers.
    """

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("r", "vera_dropout")
    shared_layer_names = ("vera_A", "vera_B")
    container_classes = {"vera_dropout": nn.ModuleDict, "vera_A": SharedBuffers, "vera_B": SharedBuffers}

    def make_adapter(self, adapter_name: str, config: VeraConfig) -> None:
        """Make the two vectors of an adapter."""
        self.r[adapter_name] = config.r
        self.vera_dropout[adapter_name] = nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity()
        self.vera_lambda_b[adapter_name] = self.new_parameter(self.out_features)
        self.vera_lambda_d[adapter_name] = self.new_parameter(config.r)

    def reset_adapter(self, adapter_name: str, config: VeraConfig) -> None:
        """Start with b at zero, or with vectors that have an effect."""
        if config.init_weights:
            nn.init.zeros_(self.vera_lambda_b[adapter_name])
            nn.init.constant_(self.vera_lambda_d[adapter_name], config.d_initial)
        else:
            nn.init.ones_(self.vera_lambda_b[adapter_name])
            nn.init.normal_(self.vera_lambda_d[adapter_name])

    def projections(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the parts of A and B that belong to this layer, (r, in_features) and (out_features, r)."""
        like = self.vera_lambda_d[adapter]
        a = self.vera_A[adapter][:, : self.in_features].to(like)
        return a, self.vera_B[adapter][: self.out_features].to(like)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute diag(b) B diag(d) A, in the layout of the base weight."""
        a, b = self.projections(adapter)
        delta = (self.vera_lambda_b[adapter].unsqueeze(1) * b) @ (self.vera_lambda_d[adapter].unsqueeze(1) * a)
        return delta.T if stores_weight_transposed(self.get_base_layer()) else delta

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute b * B (d * A x)."""
        a, b = self.projections(adapter)
        x = self.vera_dropout[adapter](x.to(a.dtype))
        return F.linear(F.linear(x, a) * self.vera_lambda_d[adapter], b) * self.vera_lambda_b[adapter]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say yes: the delta is a matrix."""
        return True


class Linear(VeraLayer, nn.Module):
    """VeRA on `nn.Linear` and on the `Conv1D` of transformers."""


__getattr__ = old_names(__name__)
