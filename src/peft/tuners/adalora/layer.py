# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA's layers: B diag(E) A, with ranks that can be taken away one by one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.additive import AdditiveLayer
from ...layers.base_layer import BaseTunerLayer
from ...layers.merging.changes import changes_adapter
from ...layers.new_tensors import draw_
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..families.ranks import RanksLeft
from ..lora.layer import LoraLayer, OnLinear, WithAdapter, make_dropout
from .allocation import RankAllocator
from .config import AdaLoraConfig
from .maths import RANK_AXIS


__all__ = ["AdaLoraConfig", "AdaLoraLayer", "LoraLayer", "RankAllocator", "SVDConv2d", "SVDLinear"]


class AdaLoraLayer(LoraLayer):
    """
    What AdaLoRA's layers share: W + scaling / ranknum * B diag(E) A, with A (r, in), E (r, 1) and B (out, r).

    Args:
        base_layer: the layer to adapt.

    Attributes:
        ranknum: number of ranks that the adapter had at first, (1,), by adapter name.
        ranks_made: number of the rank, among those, that each rank of the tensors is, by adapter name.
        ranks_left: for each rank that there was at first, whether it is left, by adapter name, once that is settled.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum", "ranks_made", "ranks_left")

    # factors are bare tensors, and those of another layer are used through that layer: as the base has it
    has_views_of_owner = False
    follow = BaseTunerLayer.follow
    adapter_aliases = BaseTunerLayer.adapter_aliases
    merged_tensors = BaseTunerLayer.merged_tensors
    _mixed_batch_forward = BaseTunerLayer._mixed_batch_forward

    def _make_containers(self) -> None:
        super()._make_containers()
        self.__dict__.pop("lora_E")
        self._modules.update({name: nn.ParameterDict() for name in (*RANK_AXIS, "ranknum")})
        self.__dict__.update(ranks_made={}, ranks_left={})

    @classmethod
    def prepare_adapter(
        cls, base: nn.Module, config: AdaLoraConfig, ranks_left: Sequence[bool] | None = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """Refuse ranks that the layer cannot have; see `BaseTunerLayer.prepare_adapter`."""
        r = arguments["r"] if ranks_left is None else len(ranks_left)
        return {**super().prepare_adapter(base, config, **{**arguments, "r": r}), "ranks_left": ranks_left}

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: AdaLoraConfig, parameter_name: str | None) -> None:
        if not isinstance(r, int) or r <= 0:
            raise PeftValueError(f"the rank init_r must be a positive integer, found {r!r}")

    def make_adapter(
        self,
        adapter_name: str,
        config: AdaLoraConfig,
        r: int,
        lora_alpha: float,
        ranks_left: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Make the tensors of an adapter, without values, and note its settings.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: number of ranks at first, positive.
            lora_alpha: numerator of the scaling; r in its place if it is not positive.
            ranks_left: one truth value per rank, to make only those.
            kwargs: kept for callers of the released package.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        r = r if ranks_left is None else len(ranks_left)
        self._refuse(self.get_base_layer(), r, config, None)
        made = r if ranks_left is None else sum(map(bool, ranks_left))
        # a setting that stands among the parameters, since the released package has it there; it always has a value
        weight = self.stored_weight()
        self.ranknum[adapter_name] = nn.Parameter(
            torch.full((1,), float(r), device="cpu" if weight.is_meta else weight.device), requires_grad=False
        )
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = self._configured_scaling(adapter_name)
        self.lora_dropout[adapter_name] = make_dropout(config)
        rows, columns = self._matrix_shape()
        self.lora_A[adapter_name] = self.new_parameter(made, columns)
        self.lora_E[adapter_name] = self.new_parameter(made, 1)
        self.lora_B[adapter_name] = self.new_parameter(rows, made)
        # a list as long as the rank only once tensors of that rank were found to be sensible
        self.r[adapter_name] = made
        self.ranks_made[adapter_name] = [rank for rank in range(r) if ranks_left is None or ranks_left[rank]]
        if ranks_left is not None:
            self.ranks_left[adapter_name] = list(map(bool, ranks_left))

    def _matrix_shape(self) -> tuple[int, int]:
        """Give the size of the matrix that is adapted: outputs, inputs."""
        return self.out_features, self.in_features

    def reset_adapter(self, adapter_name: str, config: AdaLoraConfig) -> None:
        """Start an adapter's factors anew, as the config says."""
        for factors in (self.lora_A, self.lora_E, self.lora_B):
            draw_(factors[adapter_name], self.stored_weight(), torch.Tensor.normal_)
        # what comes next for a seed comes after one more number in the released package
        draw_(self.ranknum[adapter_name].clone(), self.stored_weight(), torch.Tensor.normal_)
        if config.init_lora_weights:
            self.reset_lora_parameters(adapter_name)

    @changes_adapter
    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter's factors anew, with E at zero, so that it changes nothing.

        Args:
            adapter_name: name.
        """
        self.lora_E[adapter_name].zero_()
        for factors in (self.lora_A, self.lora_B):
            draw_(factors[adapter_name], self.stored_weight(), lambda factor: factor.normal_(std=0.02))

    @changes_adapter
    @torch.no_grad()
    def resize(self, adapter_name: str, mask: Sequence[bool]) -> None:
        """
        Take ranks away from an adapter's tensors for good.

        Args:
            adapter_name: name.
            mask: one truth value for each rank that the tensors have now; False takes it away.
        """
        for name, axis in RANK_AXIS.items():
            factor = getattr(self, name)[adapter_name]
            if factor.shape[axis] != len(mask):
                raise PeftValueError(f"the pattern has {len(mask)} ranks, the adapter has {factor.shape[axis]}")
            (smaller,) = RanksLeft(mask, axis).write(factor)
            getattr(self, name)[adapter_name] = nn.Parameter(smaller, requires_grad=factor.requires_grad)
        self.settle_ranks(adapter_name, mask)
        made = zip(self.ranks_made[adapter_name], mask, strict=True)
        self.ranks_made[adapter_name] = [rank for rank, is_left in made if is_left]
        self.r[adapter_name] = len(self.ranks_made[adapter_name])

    def settle_ranks(self, adapter_name: str, mask: Sequence[bool]) -> list[bool]:
        """
        Note which ranks are left in the end.

        Args:
            adapter_name: name.
            mask: one truth value for each rank that the tensors have now.

        Returns:
            One for each rank that there was at first.
        """
        left = {rank for rank, is_left in zip(self.ranks_made[adapter_name], mask, strict=True) if is_left}
        self.ranks_left[adapter_name] = [rank in left for rank in range(int(self.ranknum[adapter_name]))]
        return self.ranks_left[adapter_name]

    def saved_forms(self, adapter_name: str) -> dict[str, RanksLeft]:
        """Save what is left; see `BaseTunerLayer.saved_forms`."""
        if adapter_name not in self.ranks_left:
            return {}
        left = [self.ranks_left[adapter_name][rank] for rank in self.ranks_made[adapter_name]]
        return {name: RanksLeft(left, axis) for name, axis in RANK_AXIS.items()}

    def _factor(self, name: str, adapter: str) -> torch.Tensor:
        """Give a factor of the delta, without its scaling: B, or diag(E) A / ranknum."""
        factor = getattr(self, name)[adapter]
        if name == "lora_B":
            return factor
        # the summand is part of the interface: it keeps outputs equal to those of the released package
        return factor * (self.lora_E[adapter] / (self.ranknum[adapter].to(factor) + 1e-5))

    def _configured_scaling(self, adapter: str) -> float:
        alpha = self.lora_alpha[adapter]
        return alpha if alpha > 0 else float(self.ranknum[adapter])


class SVDLinear(OnLinear, WithAdapter, AdaLoraLayer, nn.Module):
    """AdaLoRA on `nn.Linear` and on transformers' `Conv1D`; see `WithAdapter`."""

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling / ranknum * B diag(E) A x."""
        a, b = self._factor("lora_A", adapter), self._factor("lora_B", adapter)
        hidden = F.linear(self.lora_dropout[adapter](x.to(a.dtype)), a)
        return F.linear(hidden * self.scaling[adapter], b)


class SVDConv2d(WithAdapter, AdaLoraLayer, nn.Module):
    """AdaLoRA on `nn.Conv2d`, whose weight counts as a matrix with one row per output channel; see `WithAdapter`."""

    factor_layout = (("lora_B", False), ("lora_A", False))
    add_delta_ = AdditiveLayer.add_delta_

    @classmethod
    def _factor_shapes(cls, base: nn.Module, r: int, parameter_name: str | None) -> Iterator[tuple[int, ...]]:
        yield from ((r, math.prod(base.weight.shape[1:])), (base.out_channels, r))

    def _matrix_shape(self) -> tuple[int, int]:
        weight = self.get_base_weight()
        return weight.shape[0], weight[0].numel()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the delta, (out, in / groups, height, width).

        Args:
            adapter: name.
        """
        return super().get_delta_weight(adapter).view(self.get_base_weight().shape)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the delta."""
        return AdditiveLayer.delta_forward(self, adapter, self.lora_dropout[adapter](x))


__getattr__ = old_names(__name__)
