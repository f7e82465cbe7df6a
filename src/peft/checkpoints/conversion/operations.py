# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Operations on tensors, as transformers applies them when it converts weights."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, ConversionOps

from ...utils.error import PeftNotImplementedError


class PermuteDims(ConversionOps):
    """
    Puts the dimensions of each tensor into another order.

    Args:
        dims: the dimensions in their new order.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the same names with tensors whose dimensions are permuted."""
        return {name: tensor.permute(*self.dims).contiguous() for name, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation that puts the dimensions back."""
        return PermuteDims(tuple(self.dims.index(i) for i in range(len(self.dims))))


class FlattenDims(ConversionOps):
    """
    Makes one dimension of several that follow each other.

    Args:
        dims: the dimensions, of which the first and the last count.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the same names with flattened tensors."""
        return {name: tensor.flatten(self.dims[0], self.dims[-1]) for name, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: the sizes are gone."""
        raise PeftNotImplementedError("FlattenDims cannot be reversed, since the sizes of the dimensions are not kept")


class PeftConcatenate(Concatenate):
    """Makes factor B of a parameter of experts from those of the layers that went into it: (experts, out, r) each."""

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Give the factor (all outs, all ranks * experts) under the name of the target."""
        return {self.get_target_pattern(target_patterns): stacked_b([input_dict[name] for name in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: what was trained on the parameter need not fall into blocks."""
        raise PeftNotImplementedError("an adapter of fused experts cannot be split into one per layer")


def stacked_a(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make one factor A of those of several layers, (experts, r, in) each; the ranks of an expert stay together."""
    return torch.cat(tuple(factors), dim=1).flatten(0, 1)


def stacked_b(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make one factor B of those of several layers, (experts, out, r) each; in its columns the experts take turns."""
    blocks = torch.stack([torch.block_diag(*expert) for expert in zip(*factors, strict=True)])
    return blocks.permute(1, 2, 0).flatten(1, 2)
