# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on convolutions: factor A is a convolution like the base layer, factor B one with a kernel of 1."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, CONVOLVE, convolve
from ...layers.additive import AdditiveLayer
from ...layers.base_layer import BaseTunerLayer
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.warning import warn
from ..families.ranks import RankAxis
from .config import LoraConfig


def _factor(weight: nn.Parameter, bias: nn.Parameter | None = None, **geometry: object) -> nn.Module:
    """Make a convolution around a weight that is made elsewhere, so that nothing is drawn at random twice."""
    channels, in_channels, *kernel = weight.shape
    groups = geometry.get("groups", 1)
    layer = CONVOLUTIONS[len(kernel) - 1](
        in_channels * groups, channels, tuple(kernel), bias=bias is not None, device="meta", **geometry
    )
    layer._parameters.update(weight=weight, bias=bias)
    return layer


class OnConvolution:
    """
    What LoRA's layers for convolutions have in common, to be mixed into `LoraLayer`.

    A has all input channels, also where the base layer is grouped; B is grouped like the base layer. So the delta of
    a grouped layer mixes channels that its weight keeps apart, and cannot be merged into it.
    """

    @property
    def _groups(self) -> int:
        return self.get_base_layer().groups

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: LoraConfig, parameter_name: str | None) -> None:
        super()._refuse(base, r, config, parameter_name)
        if r % base.groups:
            raise PeftValueError(
                f"the rank of a convolution with {base.groups} groups must be a multiple of {base.groups}, found r={r}"
            )

    @classmethod
    def _factor_shapes(cls, base: nn.Module, r: int, parameter_name: str | None) -> Iterator[tuple[int, ...]]:
        yield from ((r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups))

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        """Make the factors, without values; see `LoraLayer`."""
        base = self.get_base_layer()
        if base.groups > 1:
            warn(f"an adapter on a convolution with {base.groups} groups cannot be merged")
        ones = [1] * len(base.kernel_size)
        bias = self.new_parameter(base.out_channels) if config.lora_bias else None
        self.lora_A[adapter] = _factor(
            self.new_parameter(r, base.in_channels, *base.kernel_size),
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            padding_mode=base.padding_mode,
        )
        self.lora_B[adapter] = _factor(
            self.new_parameter(base.out_channels, r // base.groups, *ones), bias, groups=base.groups
        )

    def rank_axis(self, name: str) -> RankAxis:
        """Say where a factor of this layer has its ranks; see `LoraLayer.rank_axis`."""
        return dataclasses.replace(super().rank_axis(name), groups=self._groups)

    @classmethod
    def check_following(cls, base: nn.Module, owner: nn.Module) -> None:
        """
        Refuse factors that are those of another number of groups; see `BaseTunerLayer.check_following`.

        Raises:
            PeftValueError: in that case.
        """
        groups = getattr(owner, "groups", 1)
        if groups not in (1, base.groups):
            raise PeftValueError(
                f"a convolution with {base.groups} groups cannot stay tied to one with {groups}: factors that fit "
                "the one do not fit the other; set ensure_weight_tying=False"
            )

    def follow(self, adapter_name: str, owner: BaseTunerLayer) -> None:
        """Take an adapter from another convolution with the same weight; stride, dilation and padding may differ."""
        self.check_following(self.get_base_layer(), owner.get_base_layer())
        super().follow(adapter_name, owner)

    def factor_weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the factors as matrices, (r, in * kernel) and (out, r / groups); they are views."""
        into, out = super().factor_weights(adapter)
        return into.flatten(1), out.flatten(1)

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give two matrices whose product is the delta without its scaling, each filter of the base weight as a row.

        Returns:
            (out, r) and (r, in * kernel), views of the factors. There is no such product for grouped layers, for
            which the first is (out, r / groups).
        """
        left, right = super().delta_factors(adapter)
        return left.flatten(1), right.flatten(1)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what the adapter adds to the base weight, in its shape.

        Args:
            adapter: name.

        Raises:
            PeftNotImplementedError: for grouped layers.
        """
        self._refuse_groups()
        return super().get_delta_weight(adapter).view(self.get_base_weight().shape)

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """Add the delta, without ever holding it whole where the weight can be seen as a matrix."""
        if weight.is_contiguous():
            super().add_delta_(adapter, weight.view(weight.shape[0], -1), sign)
        else:  # channels last
            AdditiveLayer.add_delta_(self, adapter, weight, sign)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x, with A in this layer's geometry, also where the factors are an owner's."""
        source, base = self.source(adapter), self.get_base_layer()
        a, b = source.lora_A[adapter].weight, source.lora_B[adapter]
        if self.cast_input_dtype_enabled and x.dtype != a.dtype:
            x = x.to(a.dtype)
        x = self.lora_dropout[adapter](x)
        if source._groups != self._groups:
            return convolve(base, x, source.get_delta_weight(adapter), self._groups)
        hidden = convolve(base, x, a) * source.scaling[adapter]
        bias = None if b.bias is None else b.bias * source.scaling[adapter]
        return CONVOLVE[len(base.kernel_size)](hidden, b.weight, bias, groups=base.groups)

    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse grouped layers, and an adapter with a bias on a layer without one.

        Raises:
            PeftNotImplementedError: for grouped layers.
            PeftRuntimeError: for a bias that has no place.
        """
        if adapter_name not in self._owners:
            self._refuse_groups()
        super().check_mergeable(adapter_name)

    def _refuse_groups(self) -> None:
        if self._groups > 1:
            raise PeftNotImplementedError(
                f"factor A mixes all input channels of a convolution with {self._groups} groups, whose weight cannot: "
                "such an adapter has no delta and cannot be merged; keep it unmerged"
            )
