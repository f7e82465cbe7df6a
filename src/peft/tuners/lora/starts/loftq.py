# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoftQ: factors that make up for what quantising the base weight loses.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, arXiv:2310.08659.
"""

from collections.abc import Callable

import torch
from torch import nn

from ....anatomy.kinds import stores_weight_transposed
from ....utils.error import PeftValueError
from ....utils.optional_packages import is_bnb_available
from ..low_rank import LowRankLayer
from .base_weight import FromBaseWeight
from .registry import register_start


@register_start("loftq")
class LoftQ(FromBaseWeight):
    """
    The weight becomes what a quantised one would be, and scaling * B A the best approximation of what it loses.

    Both are fitted in turns.
    """

    is_taken_out = False

    def refusal_of_weight(self, base: nn.Module, rank: int) -> Exception | None:
        """Say what about a weight, the settings or libraries stands against it."""
        settings = (self.config.loftq_config if self.config is not None else None) or {}
        bits, steps = settings.get("loftq_bits"), settings.get("loftq_iter")
        if bits not in (4, 8) or not isinstance(steps, int) or steps < 1:
            return PeftValueError(
                "init_lora_weights='loftq' needs loftq_config=LoftQConfig(loftq_bits=4 or 8, loftq_iter=1 or more), "
                f"found loftq_bits={bits!r}, loftq_iter={steps!r}"
            )
        if not is_bnb_available():
            return PeftValueError("init_lora_weights='loftq' rounds weights with bitsandbytes; install it")
        return super().refusal_of_weight(base, rank)

    def make_factors(
        self, layer: LowRankLayer, adapter: str, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the factors; what was rounded last is kept as factors too, since weights are put off until the end."""
        settings, scaling = self.config.loftq_config, layer.scaling[adapter]
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        for step in range(settings["loftq_iter"]):
            rounded = rounded_to_bits(self._to_round(weight, scaling), settings["loftq_bits"])
            b, a = fit_loss(weight - rounded, layer.r[adapter], scaling)
            if step < settings["loftq_iter"] - 1:
                self._before = b, a
        return b, a

    def _to_round(self, weight: torch.Tensor, scaling: float) -> torch.Tensor:
        """Give what is left of a weight for the quantised one to approximate."""
        if self._before is None:
            return weight
        b, a = self._before
        return torch.addmm(weight, b, a, alpha=-scaling)

    def change_of_base(
        self, layer: LowRankLayer, adapter: str, b: torch.Tensor, a: torch.Tensor
    ) -> Callable[[], None]:
        """Round the weight, which stays the same parameter; see `FromBaseWeight.change_of_base`."""

        @torch.no_grad()
        def change() -> None:
            weight = layer.get_base_weight()
            transposed = stores_weight_transposed(layer.get_base_layer())
            matrix = (weight.T if transposed else weight).to(b.dtype)
            left = self._to_round(matrix, layer.scaling[adapter])
            rounded = rounded_to_bits(left, self.config.loftq_config["loftq_bits"])
            weight.copy_(rounded.T if transposed else rounded)
            layer.__dict__["base_changed_by"] = adapter

        return change


def rounded_to_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Round a matrix to what bitsandbytes' quantised one would stand for.

    Args:
        weight: (out, in)
        bits: 4 for its "nf4" in blocks of the usual size, 8 for its integers with a scale for each row.

    Returns:
        The same shape and type.
    """
    from bitsandbytes import functional

    if bits == 4:
        codes, state = functional.quantize_4bit(weight.float().contiguous(), quant_type="nf4")
        return functional.dequantize_4bit(codes, state).to(weight)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
    return functional.int8_vectorwise_dequant(codes, scales).to(weight)


def fit_loss(loss: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Give the factors with which scaling * B A approximates a matrix best.

    Args:
        loss: (out, in), what a weight loses by being quantised.
        rank: rank of the factors.
        scaling: what the adapter multiplies their product with.

    Returns:
        B (out, rank) and A (rank, in), with equal parts of the singular values.
    """
    u, s, vh = torch.linalg.svd(loss, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def loftq_init(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Fit a quantised weight and factors, for an adapter without scaling; for callers of the released package.

    Args:
        weight: (out, in)
        num_bits: 4 or 8.
        reduced_rank: rank of the factors.
        num_iter: how often both are fitted.

    Returns:
        What the quantised weight stands for, in the type of `weight`; A (rank, in) and B (out, rank).

    Raises:
        PeftValueError: for other numbers.
    """
    if num_bits not in (4, 8) or num_iter < 1:
        raise PeftValueError(f"num_bits must be 4 or 8 and num_iter positive, found {num_bits} and {num_iter}")
    matrix = left = weight.detach().float()
    for _ in range(num_iter):
        rounded = rounded_to_bits(left, num_bits)
        b, a = fit_loss(matrix - rounded, reduced_rank, 1.0)
        left = matrix - b @ a
    return rounded.to(weight), a, b
