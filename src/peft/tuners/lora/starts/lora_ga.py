# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA-GA: factors along singular directions of the weight's gradient.

Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ....anatomy.kinds import stores_weight_transposed
from ....utils.error import PeftValueError
from ....utils.near_names import FEW
from ....utils.quantization_utils import resolve_quantization_backend
from ....utils.seeding import seeded
from ....utils.warning import warn
from ..config import LoraGAConfig
from ..low_rank import LowRankLayer
from .base_weight import FromBaseWeight
from .random import Neutral
from .registry import register_start


# what `preprocess_loraga` leaves on each target, and what it is called in files
GRADIENT = "_peft_loraga_grad"
KINDS = (nn.Linear, Conv1D)
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@register_start("lora_ga")
class LoraGA(FromBaseWeight):
    """
    Factors from the gradient that `preprocess_loraga` has left on the base layer; their product moves to them.

    A layer without one, as of an adapter that is loaded, starts neutrally, and its weight stays as it is.
    """

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """Say what stands against factors from a gradient, where there is one; see `Start.refusal`."""
        if not hasattr(base, GRADIENT):
            return None
        refusal = super().refusal(base, rank, layer, adapter)
        if refusal is not None or isinstance(base, nn.Embedding):
            return refusal
        gradient, weight = getattr(base, GRADIENT), base.weight
        if gradient.shape != weight.shape:
            return PeftValueError(
                f"preprocess_loraga has left a gradient of shape {tuple(gradient.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; call it again for this model"
            )
        if not gradient.isfinite().all():
            return PeftValueError(
                "preprocess_loraga has left a gradient with nan or infinite entries; check the loss of train_step"
            )
        return None

    def refusal_of_weight(self, base: nn.Module, rank: int) -> Exception | None:
        """Say what about a weight, or the settings, stands against it; see `FromBaseWeight.refusal_of_weight`."""
        backend = resolve_quantization_backend(base)
        if backend is not None:
            return PeftValueError(
                f"init_lora_weights='lora_ga' needs gradients of the weight, and a quantised one ({backend.name}) has "
                "none; prepare the adapter before the model is quantised"
            )
        refusal = self._refusal_of_settings() or super().refusal_of_weight(base, rank)
        if refusal is None and 2 * rank > min(base.weight.shape):
            return PeftValueError(
                f"init_lora_weights='lora_ga' takes r directions for each factor from 2 r of the gradient, and a "
                f"{type(base).__name__} of shape {tuple(base.weight.shape)} has {min(base.weight.shape)}; use r <= "
                f"{min(base.weight.shape) // 2}, or rank_pattern for this layer"
            )
        return refusal

    def _refusal_of_settings(self) -> Exception | None:
        settings = None if self.config is None else self.config.lora_ga_config
        if settings is None:
            return PeftValueError("init_lora_weights='lora_ga' needs its settings: give lora_ga_config=LoraGAConfig()")
        for name, allowed in (("direction", DIRECTIONS), ("scale", SCALES)):
            found = getattr(settings, name)
            if found not in allowed:
                return PeftValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, found {found!r}")
        if settings.scale == "stable" and settings.stable_gamma <= 0:
            return PeftValueError(f"stable_gamma must be positive, found {settings.stable_gamma}")
        return None

    def warn_of_targets(self, targets: Mapping[str, nn.Module]) -> None:
        """Say which targets have no gradient; see `Start.warn_of_targets`."""
        names = [n for n, base in targets.items() if isinstance(base, KINDS) and not hasattr(base, GRADIENT)]
        if names:
            warn(
                f"preprocess_loraga has left no gradient for {', '.join(map(repr, names[:FEW]))}"
                f"{' ...' if len(names) > FEW else ''}: they start as with init_lora_weights=True, and their weights "
                "stay. An adapter that was trained from gradients computes something else on such weights: prepare "
                "the base model with the cache_file that it was prepared with, or save it with "
                "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            )

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """Make the factors from the gradient; neutrally where there is none."""
        if hasattr(layer.get_base_layer(), GRADIENT):
            super().start(layer, adapter)
        else:
            Neutral(True).start(layer, adapter)

    def make_factors(
        self, layer: LowRankLayer, adapter: str, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take directions and scales from the gradient, which is not needed any more."""
        base, rank = layer.get_base_layer(), layer.r[adapter]
        gradient = getattr(base, GRADIENT).to(weight)
        delattr(base, GRADIENT)
        if stores_weight_transposed(base):
            gradient = gradient.T
        b, a = factors_from_gradient(gradient, weight, rank, layer.scaling[adapter], self.config.lora_ga_config)
        # what is taken out of the weight is what its type can hold
        return b.to(base.weight.dtype).to(weight), a.to(base.weight.dtype).to(weight)


def factors_from_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, rank: int, scaling: float, settings: LoraGAConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Make factors along the leading 2 r singular directions of a gradient.

    Args:
        gradient: (out, in), float32 or float64.
        weight: (out, in)
        rank: r, at most half of the smaller side.
        scaling: what the product is going to be multiplied by.
        settings: which directions, and how they are scaled.

    Returns:
        B (out, r) and A (r, in).
    """
    with seeded(0, gradient.device):
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        of_a, of_b = _chosen(settings.direction, rank)
    a, b, first = v[:, of_a].T, u[:, of_b] * s[of_b], s[of_b[0]]
    if settings.scale == "stable":
        b = b * (gradient.shape[0] ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd" and first > 0:
        with seeded(0, weight.device):
            _, of_weight, _ = torch.svd_lowrank(weight, q=rank, niter=4)
        b = b * (of_weight[0] / first)
    elif settings.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return b, a


def _chosen(direction: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the numbers of the directions for A and for B."""
    if direction == "ArBr":
        return torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)
    first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
    if direction == "random":
        both = torch.randperm(2 * rank)[:rank]
        return both, both
    return (first, second) if direction == "ArB2r" else (second, first)
