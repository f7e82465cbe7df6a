# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Starts whose product of factors is taken out of the base weight, of which most make the factors from it.

That is put off until all layers of an injection are made (`deferring_base_changes`), so that an injection or a load
that is refused halfway has changed no weight.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ....anatomy.kinds import stores_weight_transposed
from ....layers.base_changes import change_base
from ....layers.base_layer import BaseTunerLayer
from ....utils.computed_weights import find_computed_weight
from ....utils.error import PeftRuntimeError, PeftTypeError, PeftValueError
from ....utils.progress import advance
from ....utils.quantization_utils import resolve_quantization_backend
from ....utils.warning import warn
from ..low_rank import LowRankLayer
from .random import Neutral
from .registry import Start, changes_base


def warn_of_changed_bases(name: bool | str | None, targets: Iterable[nn.Module]) -> None:
    """
    Warn of adapters that stand on base weights which the start of another one changes, or has changed.

    Args:
        name: value of `init_lora_weights` of an adapter that is about to be made.
        targets: the modules that it adapts, as they stand in the model.
    """
    layers = [module for module in targets if isinstance(module, BaseTunerLayer)]
    changed_by = {layer.__dict__.get("base_changed_by") for layer in layers} - {None}
    others = sorted({other for layer in layers for other in layer.available_adapters})
    remedy = "To use them side by side, make plain LoRA of it by saving with path_initial_model_for_weight_conversion"
    if changes_base(name) and others:
        warn(
            f"init_lora_weights={name!r} changes the base weights, on which other adapters ({', '.join(others)}) "
            f"stand: what they compute changes with them. {remedy}"
        )
    elif changed_by:
        warn(
            f"the start of adapter {changed_by.pop()!r} has changed the base weights, so an adapter that was trained "
            "on the weights as they were computes something else here, and one that is trained here fits no other "
            f"model. {remedy}"
        )


class ReadsBaseWeight(Start):
    """Factors that are made with a look at the base weight."""

    does = "reads"

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """Say what about a base weight stands against it; see `Start.refusal`."""
        return self.refusal_of_weight(base, rank)

    def refusal_of_weight(self, base: nn.Module, rank: int) -> Exception | None:
        """
        Say what about a weight stands against it.

        Args:
            base: the base layer.
            rank: rank of the factors.

        Returns:
            The exception to raise, or None.
        """
        weight, kind = getattr(base, "weight", None), type(base).__name__
        value = f"init_lora_weights={self.name!r}"
        backend = resolve_quantization_backend(base)
        if backend is not None:
            return PeftTypeError(
                f"{value} {self.does} the base weight, which is quantised here ({backend.name}); start the adapter "
                "before the model is quantised, or use another initialisation"
            )
        computed = find_computed_weight(base, "weight")
        if computed is not None:
            return PeftValueError(
                f"{value} {self.does} the base weight, which a {kind} layer computes anew in each forward pass "
                f"({computed.kind}); use another initialisation, or take the parametrisation off first"
            )
        if weight is None or weight.dim() != 2:
            return PeftValueError(
                f"{value} works for matrices, not for the weight of a {kind}; use True or 'gaussian'"
            )
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return PeftTypeError(
                f"{value} needs a base weight in float32, float64, bfloat16 or float16, found {weight.dtype}; start "
                "the adapter before the model is quantised"
            )
        if weight.is_meta:
            return PeftValueError(f"{value} reads the base weights, which are on the meta device; load them first")
        if rank > min(weight.shape):
            return PeftValueError(
                f"{value} cannot give factors of rank {rank} for a {kind} of shape {tuple(weight.shape)}; use r <= "
                f"{min(weight.shape)}, or rank_pattern for this layer"
            )
        return None


class FromBaseWeight(ReadsBaseWeight):
    """
    Factors whose product moves out of the base weight, which keeps the rest. An embedding starts neutrally.

    Subclasses supply `factorise`, or `make_factors` if they need more than the weight.
    """

    changes_base = True
    does = "changes"

    def make_factors(
        self, layer: LowRankLayer, adapter: str, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Make the factors of a layer; scaling times their product is taken out of its weight.

        Args:
            layer: the layer.
            adapter: name of the adapter.
            weight: (out, in), float32 or float64.

        Returns:
            B (out, rank) and A (rank, in).
        """
        return self.factorise(weight, layer.r[adapter], layer.scaling[adapter])

    def factorise(self, weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Factorise a matrix; scaling times the product is taken out of it.

        Args:
            weight: (out, in), float32 or float64.
            rank: rank of the factors.
            scaling: factor that the adapter multiplies the product with.

        Returns:
            B (out, rank) and A (rank, in).
        """
        raise NotImplementedError

    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Make the factors now, and have the weight changed.

        Raises:
            Exception: what `refusal` gives.
        """
        if layer.is_embedding:
            Neutral(True).start(layer, adapter)
            return
        refusal = self.refusal(layer.get_base_layer(), layer.r[adapter], layer, adapter)
        if refusal is not None:
            raise refusal
        weight = layer.get_base_weight()
        matrix = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        transposed = stores_weight_transposed(layer.get_base_layer())
        b, a = self.make_factors(layer, adapter, matrix.T if transposed else matrix)
        into, out = layer.factor_weights(adapter)
        into.copy_(a)
        out.copy_(b)
        change_base((id(layer), adapter), self.change_of_base(layer, adapter, b, a))
        advance()

    def change_of_base(
        self, layer: LowRankLayer, adapter: str, b: torch.Tensor, a: torch.Tensor
    ) -> Callable[[], None]:
        """
        Give what changes the base weight in place, once nothing can be refused any more.

        Args:
            layer: the layer.
            adapter: name of the adapter.
            b: B (out, rank), as it was made.
            a: A (rank, in)
        """
        left, right = (a.T, b.T) if stores_weight_transposed(layer.get_base_layer()) else (b, a)
        return lambda: _take_out(layer, adapter, left, right)

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """Say what stands against factors made from a base weight; see `Start.refusal`."""
        if isinstance(base, nn.Embedding):
            return None
        return self.refusal_of_weight(base, rank) or self._refusal_of_others(base, layer)

    def _refusal_of_others(self, base: nn.Module, layer: nn.Module | None) -> Exception | None:
        if not isinstance(layer, BaseTunerLayer):
            return None
        if layer.__dict__.get("base_changed_by") is not None:
            return PeftRuntimeError(
                f"the base weight of a {type(base).__name__} has been changed by adapter {layer.base_changed_by!r} "
                f"already, so init_lora_weights={self.name!r} would start from what is left of it; load the base "
                "model again. To use two such adapters in one model, save each with "
                "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            )
        return None


@torch.no_grad()
def _take_out(layer: LowRankLayer, adapter: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """Subtract a product of factors from a base weight, which stays the same parameter."""
    weight = layer.get_base_weight()
    if left.dtype == weight.dtype:
        weight.addmm_(left, right, alpha=-layer.scaling[adapter])
    else:
        weight.copy_(weight.to(left.dtype).addmm_(left, right, alpha=-layer.scaling[adapter]))
    layer.__dict__["base_changed_by"] = adapter
