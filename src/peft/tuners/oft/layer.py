# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OFT on single layers."""

import math
from typing import Any

import torch
from torch import nn

from ...layers.merging.changes import changes_adapter
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..base import BaseTunerLayer, check_adapters_to_merge
from ..families.rotations import BlockRotation, RotationLayer, cayley, full_precision, identity_like
from .config import OFTConfig


__all__ = [
    "BaseTunerLayer",
    "Conv2d",
    "Embedding",
    "Linear",
    "MultiplicativeDropoutLayer",
    "OFTConfig",
    "OFTLayer",
    "OFTRotationModule",
    "check_adapters_to_merge",
]


# ------------------------------------------------------------------------------------------------------------- math
def skew_symmetric(entries: torch.Tensor, size: int) -> torch.Tensor:
    """
    Build skew-symmetric matrices from what stands above their diagonals, row by row.

    Args:
        entries: (n, size * (size - 1) / 2)
        size: rows of each matrix.

    Returns:
        (n, size, size)
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    matrices = entries.new_zeros(len(entries), size * size).index_copy(1, rows * size + columns, entries)
    matrices = matrices.view(-1, size, size)
    return matrices - matrices.mT


def cayley_neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """
    Approximate (I + Q) (I - Q)^-1 by a series, I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1).

    That is (I + Q) (I + Q + ... + Q^(terms - 2)). Short series are those of the released package, so that its adapters
    compute the same here: three terms are used as four, two are I + 2 Q, and one is the identity.

    Args:
        skew: Q, (n, b, b).
        terms: highest power of Q, plus one.
    """
    identity = identity_like(skew)
    if terms < 2:
        return identity.expand_as(skew)
    if terms == 2:
        return identity + 2 * skew
    series = factor = identity + skew
    for _ in range(max(terms, 4) - 3):
        series = identity + torch.bmm(skew, series)
    return torch.bmm(factor, series)


def nearest_divisor(number: int, wanted: int) -> int:
    """Find the divisor of a number that is nearest to the one that is wanted; of two, the smaller."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


# ---------------------------------------------------------------------------------------------------------- modules
class MultiplicativeDropoutLayer(nn.Module):
    """
    Dropout for rotations: while training, some of the blocks become the identity.

    Args:
        p: share of the blocks; the number is rounded down.

    Example:

        >>> import torch
        >>> dropout = MultiplicativeDropoutLayer(0.5)
        >>> turned = dropout(torch.zeros(4, 2, 2))
        >>> (turned == torch.eye(2)).all(dim=(1, 2)).sum()
        tensor(2)
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Replace blocks that are chosen at random.

        Args:
            x: blocks, (n, b, b); a single one is left as it is.

        Raises:
            PeftValueError: if the blocks are not square.
        """
        if x.shape[-1] != x.shape[-2]:
            raise PeftValueError(f"blocks must be square, found shape {tuple(x.shape)}")
        dropped = int(self.p * len(x))
        if not self.training or dropped == 0 or len(x) == 1:
            return x
        chosen = torch.rand(len(x), device=x.device).argsort() < dropped
        return torch.where(chosen.view(-1, 1, 1), identity_like(x), x)


class OFTRotationModule(nn.Module):
    """
    The rotation of one adapter in one layer.

    Args:
        r: number of blocks that are learned.
        n_elements: numbers per block: b (b - 1) / 2 for blocks of b features.
        block_size: features per block.
        in_features: features that are rotated.
        coft: whether `eps` holds.
        eps: greatest norm of the skew-symmetric matrices of all blocks together.
        block_share: whether one block is used for all features.
        kernel_size: kept for callers of the released package; `in_features` counts the kernel's entries already.
        use_cayley_neumann: sum a series in place of a matrix inverse.
        num_cayley_neumann_terms: terms of the series.

    Example:

        >>> import torch
        >>> module = OFTRotationModule(r=2, n_elements=1, block_size=2, in_features=4, use_cayley_neumann=False)
        >>> module.weight.data.fill_(1.0)
        tensor([[1.],
                [1.]])
        >>> module(torch.tensor([1.0, 0.0, 0.0, 2.0])).detach() + 0.0
        tensor([ 0., -1.,  2.,  0.])
    """

    def __init__(
        self,
        r: int,
        n_elements: int,
        block_size: int,
        in_features: int,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        kernel_size: tuple[int, int] = (0, 0),
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
    ) -> None:
        super().__init__()
        self.r, self.n_elements, self.block_size, self.in_features = r, n_elements, block_size, in_features
        self.coft, self.eps, self.block_share, self.kernel_size = coft, eps, block_share, kernel_size
        self.use_cayley_neumann, self.num_cayley_neumann_terms = use_cayley_neumann, num_cayley_neumann_terms
        self.weight = nn.Parameter(torch.zeros(r, n_elements))

    def blocks(self) -> torch.Tensor:
        """Compute the blocks, (r, block_size, block_size), that rows are multiplied by from the right."""
        weight = self.weight
        if self.coft and isinstance(weight, nn.Parameter):
            self.project_()
        elif self.coft:  # a functional call has put a tensor of the caller's here, who shall find it unchanged
            weight = weight + (self.projected(weight) - weight).detach()
        skew = skew_symmetric(full_precision(weight), self.block_size)
        return cayley_neumann(skew, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(skew)

    @torch.no_grad()
    def project_(self) -> None:
        """Bring blocks that have left the ball that `eps` allows back to its surface; a step of projected descent."""
        self.weight.data.copy_(self.projected(self.weight.data))

    def projected(self, weight: torch.Tensor) -> torch.Tensor:
        """
        Compute what `project_` makes of a weight.

        Args:
            weight: of the shape of this module's; it stays as it is.
        """
        # every entry stands in its matrix twice, and each block has an equal part in the sum of squares
        radius = self.eps / math.sqrt(2 * len(weight))
        norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        shrink = (radius / norms).nan_to_num(1.0)
        # what lies on the surface but for rounding stays as it is, or each forward pass would give something else
        is_outside = shrink < 1 - 8 * torch.finfo(shrink.dtype).eps
        return weight * torch.where(is_outside, shrink, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Rotate rows.

        Args:
            x: (..., in_features)
        """
        return BlockRotation(self.blocks())(x)

    def get_weight(self) -> torch.Tensor:
        """Build the matrix that rows are multiplied by, (in_features, in_features)."""
        return self(torch.eye(self.in_features, dtype=self.weight.dtype, device=self.weight.device))


# ----------------------------------------------------------------------------------------------------------- layers
class OFTLayer(RotationLayer):
    """
    OFT on one layer.

    Attributes:
        oft_R: adapter name -> rotation of the inputs.
        oft_embedding_R: adapter name -> rotation of the rows of an embedding.
        r: adapter name -> number of blocks.
        oft_block_size: adapter name -> features per block.
        oft_dropout: adapter name -> dropout of blocks.
    """

    adapter_layer_names = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size", "oft_dropout")
    container_classes = dict.fromkeys(("oft_R", "oft_embedding_R", "oft_dropout"), nn.ModuleDict)
    rotation_name = "oft_R"

    def make_adapter(self, adapter_name: str, config: OFTConfig, r: int | None = None, **kwargs: Any) -> None:
        """
        Make the rotation.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: number of blocks, if it is another one than the config's.
            kwargs: not used; kept for callers of the released package.

        Raises:
            PeftValueError: for an unknown `init_weights`.
        """
        if not isinstance(config.init_weights, bool):
            raise PeftValueError(f"init_weights must be True or False, found {config.init_weights!r}")
        features = self.rows_to_rotate()
        r = config.r if r is None else r
        if config.oft_block_size:
            size = self.adjust_oft_parameters(features, config.oft_block_size)
            _warn_if_adjusted("oft_block_size", config.oft_block_size, size, features)
        else:
            count = self.adjust_oft_parameters(features, r)
            _warn_if_adjusted("r", r, count, features)
            size = features // count
        count = features // size
        module = OFTRotationModule(
            1 if config.block_share else count,
            size * (size - 1) // 2,
            size,
            features,
            config.coft,
            config.eps,
            config.block_share,
            getattr(self.get_base_layer(), "kernel_size", (0, 0)),
            config.use_cayley_neumann,
            config.num_cayley_neumann_terms,
        )
        module.weight = self.new_parameter(*module.weight.shape)
        self._modules[self.rotation_name][adapter_name] = module
        dropout = config.module_dropout
        self.oft_dropout[adapter_name] = MultiplicativeDropoutLayer(dropout) if dropout > 0 else nn.Identity()
        self.r[adapter_name], self.oft_block_size[adapter_name] = count, size

    def adjust_oft_parameters(self, in_features: int, params: int) -> int:
        """
        Find a block size, or a number of blocks, that divides the features.

        Args:
            in_features: features that are rotated.
            params: what is wanted.

        Returns:
            The divisor nearest to what is wanted; of two, the smaller.
        """
        return nearest_divisor(in_features, params)

    def reset_adapter(self, adapter_name: str, config: OFTConfig) -> None:
        """Start without a turn, or at random."""
        self.reset_oft_parameters(adapter_name, config.init_weights)

    @changes_adapter
    def reset_oft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for no turn, False for a random one.
        """
        weight = self._modules[self.rotation_name][adapter_name].weight
        nn.init.zeros_(weight) if init_weights else nn.init.normal_(weight, std=0.1)

    def rotation(self, adapter: str, training: bool = False) -> BlockRotation:
        """Compute the blocks of an adapter; see `RotationLayer.rotation`."""
        blocks = self._modules[self.rotation_name][adapter].blocks()
        return BlockRotation(self.oft_dropout[adapter](blocks) if training else blocks)


def _warn_if_adjusted(name: str, wanted: int, used: int, features: int) -> None:
    if wanted != used:
        warn(f"{name}={wanted} does not divide the {features} features of a layer; {used} is used there")


class Linear(OFTLayer, nn.Module):
    """OFT on `nn.Linear` and transformers' `Conv1D`; see `BaseTunerLayer` for the arguments."""


class Conv2d(OFTLayer, nn.Module):
    """OFT on `nn.Conv2d`: what is rotated are the rows of the weight (out, in * kernel height * kernel width)."""

    transforms_input = False


class Embedding(OFTLayer, nn.Module):
    """OFT on `nn.Embedding`: the rows that are looked up are rotated."""

    rotation_name = "oft_embedding_R"
    transforms_input = False
    corrects_output = True

    def rows_to_rotate(self) -> int:
        """The width of the embedding."""
        return self.out_features

    def weight_rotation(self, adapter: str, training: bool = False) -> BlockRotation:
        """Rows of the weight are what is rotated."""
        return self.rotation(adapter, training)

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Rotate what was looked up."""
        return self.source(adapter).weight_rotation(adapter, self.training)(result).to(result.dtype)
