# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Block-diagonal LoRA: one of the two factors of a layer is block-diagonal, so that devices can hold whole blocks.

Wang et al., "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", 2025,
arXiv:2510.23346.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ....anatomy.kinds import features
from ....layers.new_tensors import draw_
from ....utils.error import PeftValueError
from ..config import BdLoraConfig, LoraConfig
from ..low_rank import LowRankLayer
from ..starts import Start
from .base import OwnStart
from .registry import register_variant


class BlockDiagonalLinear(nn.Module):
    """
    A linear layer whose matrix has blocks on its diagonal and is zero elsewhere; only the blocks are kept.

    Args:
        in_features: columns of the matrix.
        out_features: rows of it.
        nblocks: number of blocks, which divides both.
        init_zero: start with zeros; at random otherwise.
        dtype: type of the weight.
        device: where it is made.

    Attributes:
        weight: (out_features, in_features / nblocks), the blocks one below the other.

    Example:

        >>> from peft.tuners.lora.variants import BlockDiagonalLinear
        >>> BlockDiagonalLinear(4, 6, nblocks=2).weight_as_blockdiagonal_matrix().shape
        torch.Size([6, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refusal = _refusal_of_blocks(nblocks, in_features=in_features, out_features=out_features)
        if refusal is not None:
            raise refusal
        self._set(nn.Parameter(torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device)), nblocks)
        with torch.no_grad():
            self.weight.zero_() if init_zero else _draw_block(self.weight)

    @classmethod
    def around(cls, weight: nn.Parameter, nblocks: int, bias: nn.Parameter | None = None) -> "BlockDiagonalLinear":
        """
        Make the layer around a weight that is made elsewhere.

        Args:
            weight: (out_features, in_features / nblocks).
            nblocks: number of blocks.
            bias: (out_features,), which is kept and not added here.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set(weight, nblocks, bias)
        return made

    def _set(self, weight: nn.Parameter, nblocks: int, bias: nn.Parameter | None = None) -> None:
        self.weight, self.nblocks, self.bias = weight, nblocks, bias

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.weight.shape[1] * self.nblocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Apply each block to its part of the input.

        Args:
            x: (..., in_features).
        """
        if self.nblocks == 1:
            return F.linear(x, self.weight)
        parts = x.reshape(-1, self.nblocks, self.weight.shape[1]).transpose(0, 1)
        blocks = self.weight.view(self.nblocks, -1, self.weight.shape[1])
        return torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def weight_as_blockdiagonal_matrix(self) -> torch.Tensor:
        """Give the matrix written out, (out_features, in_features)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))


@register_variant("use_bdlora")
class BdLora(OwnStart):
    """
    BD-LoRA: plain LoRA of which factor A, or factor B, is block-diagonal, as the config's lists of targets say.

    A is where the layer is divided by its inputs in a tensor-parallel server (output and down projections), B where it
    is divided by its outputs.
    """

    name = "BD-LoRA (use_bdlora)"
    has_room = False
    adds_delta = True

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.settings = config.use_bdlora

    @classmethod
    def applies_to(cls, config: LoraConfig, target: str | None) -> bool:
        """Say whether one of the lists has the target; one that neither has is plain LoRA."""
        return target is None or bool(_sides(config.use_bdlora, target))

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Say what stands against blocks in a target; see `LoraVariant.refusal`."""
        settings = config.use_bdlora
        sides = _sides(settings, target)
        if not sides and not settings.match_strict:
            return None
        if len(sides) == 2:
            return PeftValueError(
                "entries of target_modules_bd_a and of target_modules_bd_b are both in its name; make them longer, so "
                "that one factor is block-diagonal"
            )
        if not sides:
            return PeftValueError(
                "neither target_modules_bd_a nor target_modules_bd_b has an entry that is in its name; add one, or "
                "set match_strict=False for plain LoRA there"
            )
        refusal = super().refusal(config, target, base, layer, rank)
        if refusal is not None:
            return refusal
        in_features, out_features = features(base)
        wide = {"in_features": in_features} if sides == ["lora_A"] else {"out_features": out_features}
        return _refusal_of_blocks(settings.nblocks, r=rank, **wide)

    @property
    def side(self) -> str:
        """The attribute that holds the block-diagonal factor."""
        if self.target is None:
            raise PeftValueError(
                f"{self.name} chooses a factor by the full name of the target; give target_name to the layer"
            )
        return _sides(self.settings, self.target)[0]

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start plain factors, so that what is drawn is what LoRA draws, and then the block-diagonal one by itself."""
        start.start(layer, adapter)
        container = getattr(layer, self.side)
        factor = container[adapter]
        if not isinstance(factor, BlockDiagonalLinear):
            rows, columns = factor.weight.shape
            blocks = layer.new_parameter(rows, columns // self.settings.nblocks)
            container[adapter] = BlockDiagonalLinear.around(blocks, self.settings.nblocks, factor.bias)
        weight = container[adapter].weight
        draw_(weight, layer.stored_weight(), _draw_block if self.side == "lora_A" else torch.Tensor.zero_)

    def written_out(self, layer: LowRankLayer, adapter: str, name: str, factor: torch.Tensor) -> torch.Tensor:
        """Write out the blocks as a whole matrix."""
        return torch.block_diag(*factor.chunk(self.settings.nblocks)) if name == self.side else factor

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x, the blocks one by one."""
        hidden = layer.lora_A[adapter](layer.prepared_input(adapter, x)) * layer.scaling[adapter]
        b = layer.lora_B[adapter]
        if b.bias is None or not isinstance(b, BlockDiagonalLinear):
            return layer.output_of(adapter, hidden)
        return b(hidden) + b.bias * layer.scaling[adapter]


def _sides(settings: BdLoraConfig, target: str) -> list[str]:
    """List the attributes of the factors that are to be block-diagonal."""
    lists = {"lora_A": settings.target_modules_bd_a, "lora_B": settings.target_modules_bd_b}
    return [side for side, entries in lists.items() if any(entry in target for entry in entries or ())]


def _refusal_of_blocks(nblocks: int, **sizes: int) -> PeftValueError | None:
    """Say which sizes cannot be divided into blocks."""
    wrong = [f"{name}={size}" for name, size in sizes.items() if nblocks < 1 or size % nblocks]
    if not wrong:
        return None
    return PeftValueError(f"nblocks={nblocks} does not divide {' and '.join(wrong)}; use a number that does")


def _draw_block(weight: torch.Tensor) -> None:
    """Draw from the uniform distribution with which torch keeps the size of activations, for the width of a block."""
    bound = math.sqrt(6 / weight.shape[1])
    weight.uniform_(-bound, bound)
