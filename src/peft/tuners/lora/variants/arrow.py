# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Arrow: tokens are routed to those of a layer's LoRA adapters whose product answers most strongly, without training.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024, arXiv:2405.11157. Adapters
with general knowledge are subtracted first if the config says so (GenKnowSub, ACL 2025, 2025.acl-short.54).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ....utils.error import PeftNotImplementedError, PeftRuntimeError, PeftValueError
from ....utils.kept_values import KeptValue
from ..config import ArrowConfig, LoraConfig
from ..low_rank import LowRankLayer
from .base import OfLinearLayers
from .registry import find_variant, register_variant


TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
ROUTER = "arrow_router"


class HasWeight(Protocol):
    """A factor: a module with a matrix."""

    weight: torch.Tensor


class WrittenOut(NamedTuple):
    """The matrix that a factor stands for."""

    weight: torch.Tensor


Factors = Mapping[str, HasWeight]


class ArrowLoraLinearLayer(nn.Module):
    """
    The router of one layer.

    Nothing of the experts is changed. What is computed of them is kept for as long as their tensors stay as they are.

    Args:
        in_features: inputs of the layer.
        arrow_config: its settings.

    Attributes:
        prototypes: (experts, in) unit vectors that the product of each expert's factors stretches most; None before
            the first forward pass.
    """

    # names of the adapters that the prototypes were computed from, and the prototypes
    _kept: tuple[list[str], KeptValue] | None = None

    def __init__(self, in_features: int, arrow_config: ArrowConfig) -> None:
        super().__init__()
        self.in_features, self.settings, self.router = in_features, arrow_config, ROUTER
        self.register_buffer("prototypes", None, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    # ----------------------------------------------------------------------------------------------------- the experts
    def general_names(self, names: Iterable[str]) -> list[str]:
        """
        Find the adapters with general knowledge.

        Args:
            names: those of the layer's adapters.
        """
        listed = self.settings.gks_adapter_names or ()
        numbered = re.compile(re.escape(GKS_ADAPTER_PREFIX) + r"\d+")
        return [name for name in names if name in listed or numbered.fullmatch(name)]

    def expert_names(self, names: Iterable[str]) -> list[str]:
        """
        Find the experts: those that the config lists, in its order, and all that were added later.

        Args:
            names: those of the layer's adapters.
        """
        names = list(names)
        others = {self.router, ROUTER, *self.general_names(names)}
        listed = [name for name in self.settings.task_adapter_names or () if name in names]
        return listed + [name for name in names if name not in others and name not in listed]

    def gen_know_sub(self, lora_A: Factors, lora_B: Factors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Give the experts' factors, without the mean of those of general knowledge if the config asks for it.

        Args:
            lora_A: name of an adapter -> factor A (r, in).
            lora_B: name of an adapter -> factor B (out, r).

        Returns:
            A and B of each expert.
        """
        general = self.general_names(lora_A) if self.settings.use_gks else []
        sides = []
        for side in (lora_A, lora_B):
            factors = [side[name].weight for name in self.expert_names(lora_A)]
            if general:
                mean = torch.stack([side[name].weight for name in general]).mean(0)
                factors = [factor - mean for factor in factors]
            sides.append(factors)
        return sides[0], sides[1]

    def top_right_singular_vec_from_BA(
        self, A: torch.Tensor, B: torch.Tensor, iters: int = 15, eps: float = 1e-8
    ) -> torch.Tensor:
        """
        Compute the leading right singular vector of B A, without that product.

        Args:
            A: (r, in).
            B: (out, r).
            iters: has no effect; the vector is exact.
            eps: has no effect.

        Returns:
            (in,) in float32, of norm 1; its sign means nothing.
        """
        across, along = torch.linalg.qr(A.T.float())
        return across @ torch.linalg.svd(B.float() @ along.T, full_matrices=False).Vh[0]

    @torch.no_grad()
    def build_prototypes(self, lora_A: Factors, lora_B: Factors) -> None:
        """
        Compute the prototypes of the experts, unless their tensors are those from which they were computed.

        Args:
            lora_A: name of an adapter -> factor A.
            lora_B: name of an adapter -> factor B.
        """
        used = [*self.expert_names(lora_A), *self.general_names(lora_A)]
        tensors = tuple(side[name].weight for side in (lora_A, lora_B) for name in used)
        counted = KeptValue.is_possible(tensors)
        if counted and self._kept is not None and self._kept[0] == used:
            kept = self._kept[1].get(tensors, ())
            if kept is not None and kept is self.prototypes:
                return
        with torch.inference_mode(False):
            factors = zip(*self.gen_know_sub(lora_A, lora_B), strict=True)
            vectors = [self.top_right_singular_vec_from_BA(a, b).to(a.dtype) for a, b in factors]
            self.prototypes = torch.stack(vectors)
        self.__dict__["_kept"] = (used, KeptValue(self.prototypes, tensors, ())) if counted else None

    def on_adapter_change(self, lora_A: Factors, lora_B: Factors) -> None:
        """
        Compute the prototypes anew, for callers of the released package; the forward pass sees by itself what changes.

        Args:
            lora_A: name of an adapter -> factor A.
            lora_B: name of an adapter -> factor B.
        """
        self.build_prototypes(lora_A, lora_B)

    # -------------------------------------------------------------------------------------------------------- routing
    def forward(
        self,
        x: torch.Tensor,
        lora_A: Factors,
        lora_B: Factors,
        dropout: nn.Module,
        scaling: Mapping[str, float],
    ) -> torch.Tensor:
        """
        Compute what the experts add to the output of the layer.

        Args:
            x: (..., in).
            lora_A: name of an adapter -> factor A.
            lora_B: name of an adapter -> factor B.
            dropout: for the sum of what they add.
            scaling: name of an adapter -> factor of its product.

        Returns:
            (..., out), in the type of the factors.

        Raises:
            PeftRuntimeError: if there are fewer experts than each token needs.
        """
        experts, wanted = self.expert_names(lora_A), self.settings.top_k
        if wanted > len(experts):
            raise PeftRuntimeError(
                f"Arrow routes each token to top_k={wanted} experts, and the layer has {len(experts)} "
                f"({', '.join(experts)}); load more adapters, or lower top_k"
            )
        self.build_prototypes(lora_A, lora_B)
        a, b = self.gen_know_sub(lora_A, lora_B)
        x = x.to(a[0].dtype)
        weights = self._weights(x)
        scaled = weights * weights.new_tensor([scaling[name] for name in experts])
        ranks = torch.tensor([len(factor) for factor in a], device=x.device)
        # all experts as one adapter, of which each token has its own scaling for each rank
        hidden = (x @ torch.cat(a).T) * scaled.repeat_interleave(ranks, dim=-1)
        return dropout(hidden @ torch.cat(b, dim=1).T)

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """Compute how much of each expert each token gets: (..., experts), of which `top_k` are not zero."""
        answers = (x @ self.prototypes.to(x.dtype).T).abs()
        best = answers.topk(self.settings.top_k, dim=-1)
        shares = torch.softmax(best.values / self.settings.router_temperature, dim=-1)
        return torch.zeros_like(answers).scatter(-1, best.indices, shares)


@register_variant("arrow_config")
class Arrow(OfLinearLayers):
    """
    Arrow: W x + a mixture of what other adapters of the layer add. The router's own factors have no effect.
    """

    name = "Arrow (arrow_config)"
    has_room = False

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.settings = config.arrow_config

    @classmethod
    def check_beside(cls, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
        """
        Refuse experts that do something else than to add a product of factors.

        Raises:
            PeftValueError: in that case.
        """
        for name, other in others.items():
            variant_cls = find_variant(other) if isinstance(other, LoraConfig) else None
            if variant_cls is not None and variant_cls is not cls and not variant_cls.adds_delta:
                raise PeftValueError(
                    f"adapter {name!r} uses {variant_cls.name}, and an expert that Arrow routes to has to be a "
                    "product of factors; convert it to plain LoRA with save_as_lora, or leave it out"
                )

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the router."""
        made = ArrowLoraLinearLayer(layer.in_features, self.settings)
        made.router = adapter
        layer.container("lora_arrow")[adapter] = made

    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Add what the experts give; a layer that follows a tied one routes by its own views of the factors."""
        result = layer.adapted(earlier, x, *args, **kwargs)
        router = layer.source(adapter).lora_arrow[adapter]
        term = router(x, *_factors_of(layer), layer.lora_dropout[adapter], layer.scaling)
        return (result + term).to(result.dtype)

    def check_mergeable(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Refuse to merge.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError(
            f"adapter {adapter!r} chooses experts for each token (Arrow), which a merged weight cannot; keep it "
            "unmerged"
        )

    def supports_lora_conversion(self) -> bool:
        """It cannot: what it adds depends on the token."""
        return False


def _factors_of(layer: LowRankLayer) -> tuple[Factors, Factors]:
    """Give the factors of a layer's adapters as matrices: the modules themselves, but where they have another form."""
    into, out = layer.lora_A, layer.lora_B
    if all(layer.keeps_matrices(name) for name in layer.variants if name in into):
        return into, out
    pairs = {name: layer.factors_written_out(name) for name in into}
    return (
        {name: WrittenOut(a) for name, (a, _) in pairs.items()},
        {name: WrittenOut(b) for name, (_, b) in pairs.items()},
    )
