# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
CorDA: factors from the base weight, decomposed in the metric of its inputs' covariance.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024, arXiv:2406.05223.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ....anatomy.kinds import stores_weight_transposed
from ....utils.error import PeftValueError
from ..low_rank import LowRankLayer
from .base_weight import FromBaseWeight
from .registry import register_start


@dataclass(eq=False)
class CordaEigens:
    """
    Some columns of the decomposition W = U S V', which `preprocess_corda` leaves on each target as `eigens`.

    Args:
        S_WC: (r,), singular values of the weight times the covariance of its inputs.
        U_WC: (out, r), their left singular vectors.
        V_WC: (in, r), their right singular vectors, taken back by the inverse of the covariance.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor

    def fits(self, out_features: int, in_features: int, rank: int) -> bool:
        """Say whether the shapes are those for a layer and a rank."""
        shapes = [(rank,), (out_features, rank), (in_features, rank)]
        return [tuple(tensor.shape) for tensor in self.tensors()] == shapes

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give S, U and V."""
        return self.S_WC, self.U_WC, self.V_WC


@register_start("corda")
class Corda(FromBaseWeight):
    """scaling * B A is the part of the weight that `preprocess_corda` has chosen."""

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """Refuse layers that were not prepared, or for another adapter; see `Start.refusal`."""
        refusal = super().refusal(base, rank, layer, adapter)
        if refusal is not None or isinstance(base, nn.Embedding):
            return refusal
        kind, eigens = type(base).__name__, getattr(base, "eigens", None)
        if not isinstance(eigens, CordaEigens):
            return PeftValueError(
                f"init_lora_weights='corda' needs preprocess_corda(model, config, run_model) first, and this {kind} "
                "was not prepared. To load an adapter that was saved, prepare the base model with the cache_file of "
                "its corda_config, or save it with path_initial_model_for_weight_conversion, which makes plain LoRA "
                "of it"
            )
        out_features, in_features = _out_and_in(base)
        if not eigens.fits(out_features, in_features, rank):
            found = ", ".join(str(tuple(tensor.shape)) for tensor in eigens.tensors())
            return PeftValueError(
                f"preprocess_corda has left tensors of shapes {found} for a {kind} with {in_features} inputs and "
                f"{out_features} outputs and rank {rank}; call it again with the config of this adapter"
            )
        if not all(tensor.isfinite().all() for tensor in eigens.tensors()):
            return PeftValueError(
                f"preprocess_corda has left nan or infinite entries for a {kind}; call it again, with inputs that are "
                "finite"
            )
        return None

    def make_factors(
        self, layer: LowRankLayer, adapter: str, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Share the singular values out to both factors; what was prepared is not needed any more."""
        base = layer.get_base_layer()
        s, u, v = (tensor.to(weight) for tensor in base.eigens.tensors())
        del base.eigens
        root = (s / layer.scaling[adapter]).sqrt()
        return u * root, root.unsqueeze(1) * v.T


def _out_and_in(base: nn.Module) -> tuple[int, int]:
    weight = base.weight
    return tuple(weight.shape[::-1] if stores_weight_transposed(base) else weight.shape)
