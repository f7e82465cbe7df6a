# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What X-LoRA makes of LoRA's layers: a strategy for each expert, which weighs it as the call says."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import is_linear
from ...layers.call_context import current_call
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.old_names import old_names
from ..lora.low_rank import LowRankLayer
from ..lora.variants.base import LoraVariant
from ..lora.whole_weight import OnWholeWeight


@dataclass(eq=False)
class Routing:
    """
    How much of each expert the tokens of one call get; it stands in the context of that call.

    Attributes:
        weights: (batch, length, layers, experts); None if nothing was found out yet.
        factor: what all of them are multiplied by.
        is_measuring: whether the pass runs that only gives the classifier its hidden states.
    """

    weights: torch.Tensor | None = None
    factor: float = 1.0
    is_measuring: bool = False


class Experts:
    """
    What the experts of one model have in common, as the name of their `Routing` in the context of a call.

    Args:
        names: names of the LoRA adapters, in the order of the weights.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names


def few_largest(weights: torch.Tensor, top_k: int | None, with_softmax: bool) -> torch.Tensor:
    """
    Leave each token a few experts.

    Args:
        weights: (..., experts)
        top_k: how many; None for all of them.
        with_softmax: take the softmax of those that are not 0.

    Returns:
        Weights of that shape; 0 for the others.
    """
    if top_k is not None:
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.topk(top_k, dim=-1).indices, True)
        weights = weights.masked_fill(~kept, 0)
    if with_softmax and top_k is not None:
        out = weights == 0
        weights = weights.masked_fill(out, float("-inf")).softmax(dim=-1).masked_fill(out, 0)
    return weights


class XLoraLayer(LoraVariant):
    """
    An expert of one layer: its term is weighed token by token.

    Args:
        layer: the layer.
        adapter: name of the expert in it.
        experts: all experts of the model.
        number: which one of the layers that have experts it is.

    Raises:
        PeftValueError: for a kind of layer that X-LoRA does not have, and an expert that is another variant of LoRA.
    """

    name = "X-LoRA"

    def __init__(self, layer: LowRankLayer, adapter: str, experts: Experts, number: int) -> None:
        super().__init__(layer, adapter, None)
        if adapter in layer.variants:
            raise PeftValueError(
                f"expert {adapter!r} uses {layer.variants[adapter].name}, and X-LoRA weighs plain LoRA only; use "
                "another adapter"
            )
        self.experts, self.layer, self.expert = experts, number, experts.names.index(adapter)

    def shares(self, x: torch.Tensor, dims: int) -> tuple[torch.Tensor | float, float]:
        """
        Give the weights of the expert in the call that is computed, and a factor; 1 outside of X-LoRA's calls.

        Args:
            x: the layer's input.
            dims: how many of its dimensions count tokens.

        Raises:
            PeftValueError: if the layer is given something else than the tokens of the call.
        """
        call = current_call()
        routing = None if call is None else call.notes.get(self.experts)
        if routing is None or routing.weights is None:
            return 1.0, 1.0
        weights = routing.weights[:, :, self.layer, self.expert]
        if weights.numel() != x.shape[:dims].numel():
            raise PeftValueError(
                f"X-LoRA weighs tokens of {tuple(weights.shape)}, and a layer with experts is given "
                f"{tuple(x.shape)}; adapt no such layer in the experts"
            )
        return weights.reshape(*x.shape[:dims], 1), routing.factor

    @staticmethod
    def refuse_adapter_names() -> None:
        """
        Refuse to compute a batch with an adapter per sample.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError("adapter_names does not work with X-LoRA, which chooses among experts itself")

    def forward_rows(self, layer: LowRankLayer, adapter: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse to compute a batch with an adapter per sample."""
        self.refuse_adapter_names()

    def check_mergeable(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Refuse to merge.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError(
            f"expert {adapter!r} is weighed for each token (X-LoRA), which a merged weight cannot be; keep it unmerged"
        )


class XLoraLinearLayer(XLoraLayer):
    """An expert of a linear layer: y = W x + scaling * B A (weight * x)."""

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is a linear one."""
        return is_linear(layer.get_base_layer()) and not isinstance(layer, OnWholeWeight)

    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weigh the input."""
        result = layer.adapted(earlier, x, *args, **kwargs)
        weights, factor = self.shares(x, x.dim() - 1)
        weighed = x if isinstance(weights, float) else x * weights.to(x.device, x.dtype)
        return (result + layer.delta_forward(adapter, weighed) * factor).to(result.dtype)


class XLoraEmbeddingLayer(XLoraLayer):
    """An expert of an embedding: what it adds to a token's row is weighed."""

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is an embedding."""
        return isinstance(layer.get_base_layer(), nn.Embedding) and not isinstance(layer, OnWholeWeight)

    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weigh the term."""
        result = layer.adapted(earlier, x, *args, **kwargs)
        weights, factor = self.shares(x, x.dim())
        term = layer.delta_forward(adapter, x)
        term = term if isinstance(weights, float) else term * weights.to(term.device, term.dtype)
        return (result + term * factor).to(result.dtype)


__getattr__ = old_names(__name__)
