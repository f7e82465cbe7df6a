# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The modules that hold DoRA's magnitudes, one class for each kind of layer, as the released package has them.

Layers compute with the magnitudes themselves (`dora.py`). The methods here are for those who call the modules: they
compute the same from factors that they are given, with the product of the factors whole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ....utils.quantization_utils import dequantize_module_weight


def _matrix(factor: nn.Module | torch.Tensor) -> torch.Tensor:
    return factor.weight if isinstance(factor, nn.Module) else factor


class DoraLinearLayer(nn.Module):
    """
    The magnitudes of one adapter of a linear layer.

    Args:
        fan_in_fan_out: whether the base layer stores its weight as (in, out).

    Attributes:
        weight: one number per output feature, (out,), for convolutions (1, out, 1, ...); None until it is set.

    Example:

        >>> import torch
        >>> from peft.tuners.lora.dora import DoraLinearLayer
        >>> magnitudes, base = DoraLinearLayer(fan_in_fan_out=False), torch.nn.Linear(3, 2, bias=False)
        >>> base.weight.data.copy_(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]))
        tensor([[3., 4., 0.],
                [0., 0., 2.]])
        >>> magnitudes.update_layer(base_layer=base, lora_A=torch.ones(1, 3), lora_B=torch.zeros(2, 1), scaling=1.0)
        >>> magnitudes.weight.tolist()
        [5.0, 2.0]
    """

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self.register_parameter("weight", None)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """
        Compute ||W + scaling * B A|| for each output feature.

        Args:
            weight: W, as the base layer stores it.
            lora_weight: B A, as `get_lora_weight` gives it.
            scaling: the adapter's scaling.
            adapter_name: not used; kept for callers of the released package.

        Returns:
            Of the shape of the magnitudes.
        """
        weight = weight.T if self.fan_in_fan_out else weight
        return torch.linalg.vector_norm(weight + scaling * lora_weight, dim=1).to(weight.dtype)

    def get_lora_weight(
        self, lora_A: nn.Module | torch.Tensor, lora_B: nn.Module | torch.Tensor, adapter_name: str | None = None
    ) -> torch.Tensor:
        """
        Compute B A.

        Args:
            lora_A: factor A, (r, in), or a module with it.
            lora_B: factor B, (out, r), or a module with it.
            adapter_name: not used; kept for callers of the released package.

        Returns:
            (out, in).
        """
        return _matrix(lora_B) @ _matrix(lora_A)

    def update_layer(
        self,
        *,
        base_layer: nn.Module,
        lora_A: nn.Module | torch.Tensor,
        lora_B: nn.Module | torch.Tensor,
        scaling: float,
        place_on_cpu: bool = False,
    ) -> None:
        """
        Start the magnitudes, so that the weight is W + scaling * B A at first.

        Args:
            base_layer: the base layer, quantised or not.
            lora_A: see `get_lora_weight`.
            lora_B: likewise.
            scaling: the adapter's scaling.
            place_on_cpu: keep the magnitudes in main memory.
        """
        with torch.no_grad():
            norm = self._norm(base_layer, self.get_lora_weight(lora_A, lora_B), scaling)
        self.weight = nn.Parameter(norm.to("cpu") if place_on_cpu else norm)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """
        Compute what the adapter adds to the output of the base layer.

        Args:
            x: the input.
            lora_A: module with factor A.
            lora_B: module with factor B.
            scaling: the adapter's scaling.
            base_layer: the base layer.
            base_result: its output, if that is known.
            adapter_name: not used; kept for callers of the released package.
        """
        scale = self._scale(base_layer, self.get_lora_weight(lora_A, lora_B), scaling)
        result = base_layer(x) if base_result is None else base_result
        bias = getattr(base_layer, "bias", None)
        if bias is not None:  # which is not scaled
            result = result - bias.view(1, -1, *[1] * (scale.dim() - 2)) if scale.dim() > 1 else result - bias
        return (scale - 1) * result + scale * lora_B(lora_A(x)) * scaling

    def _norm(self, base_layer: nn.Module, lora_weight: torch.Tensor, scaling: float) -> torch.Tensor:
        weight = dequantize_module_weight(base_layer)
        return self.get_weight_norm(weight, lora_weight.to(weight), scaling)

    def _scale(self, base_layer: nn.Module, lora_weight: torch.Tensor, scaling: float) -> torch.Tensor:
        # the norm is a constant in the gradient (section 4.3 of the paper)
        return self.weight / self._norm(base_layer, lora_weight.detach(), scaling).detach()


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitudes of one adapter of an embedding, whose factors are given as (num_embeddings, r) and (r, width)."""

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Compute the norm for each column of a table of embeddings; see `DoraLinearLayer.get_weight_norm`."""
        return super().get_weight_norm(weight.T, lora_weight, scaling)

    def get_lora_weight(
        self, lora_A: torch.Tensor, lora_B: torch.Tensor, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Compute the product of the factors, as (width, num_embeddings); see `DoraLinearLayer.get_lora_weight`."""
        return (lora_A @ lora_B).T

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        base_layer: nn.Module,
        embed_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.embedding,
        adapter_name: str = "default",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute what the base output is multiplied by, and what is added to it then.

        Args:
            x: token ids.
            lora_A: (num_embeddings, r).
            lora_B: (r, width).
            scaling: the adapter's scaling.
            base_layer: the base layer.
            embed_fn: looks ids up in a table.
            adapter_name: not used; kept for callers of the released package.

        Returns:
            (width,) and (..., width).
        """
        scale = self._scale(base_layer, self.get_lora_weight(lora_A, lora_B), scaling)
        return scale, scale * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Compute the norm for each output channel; see `DoraLinearLayer.get_weight_norm`."""
        norm = super().get_weight_norm(weight.flatten(1), lora_weight.reshape(len(weight), -1), scaling)
        return norm.view(1, -1, *[1] * (weight.dim() - 2))

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
        """Compute the product of the factors, as (out, in * kernel); see `DoraLinearLayer.get_lora_weight`."""
        return _matrix(lora_B).flatten(1) @ _matrix(lora_A).flatten(1)


class DoraConv1dLayer(_DoraConvNdLayer):
    """The magnitudes of one adapter of `nn.Conv1d`."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """The magnitudes of one adapter of `nn.Conv2d`."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """The magnitudes of one adapter of `nn.Conv3d`."""


# kind of base layer -> module for its magnitudes; other layers are linear
LAYER_OF_KIND: dict[type[nn.Module], type[DoraLinearLayer]] = {
    nn.Embedding: DoraEmbeddingLayer,
    nn.Conv1d: DoraConv1dLayer,
    nn.Conv2d: DoraConv2dLayer,
    nn.Conv3d: DoraConv3dLayer,
}
