# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BOFT on single layers."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import stores_weight_transposed
from ...anatomy.offload import tensor_of
from ...layers.merging.changes import changes_adapter
from ...layers.merging.layer import take_adapter_out
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..base import BaseTunerLayer, check_adapters_to_merge
from ..families.rotations import BlockRotation, Rotation, RotationLayer, cayley, full_precision, identity_like
from .config import BOFTConfig


__all__ = [
    "BOFTConfig",
    "BOFTLayer",
    "BaseTunerLayer",
    "Conv2d",
    "FastBlockDiag",
    "Linear",
    "MultiplicativeDropoutLayer",
    "check_adapters_to_merge",
    "get_fbd_cuda",
    "patch_environment",
]


# ------------------------------------------------------------------------------------------------------------- math
@dataclass(frozen=True)
class Butterfly(Rotation):
    """
    A product of block-diagonal matrices between which features are reordered.

    Factor i takes groups of 2^i neighbouring blocks, and gives each block half of its features from the first and half
    from the second half of the group.

    Args:
        blocks: (factors, features / b, b, b)
        first_is_outer: whether rows meet the last factor first.
    """

    blocks: torch.Tensor
    first_is_outer: bool = True

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features)."""
        order = range(len(self.blocks))
        for i in reversed(order) if self.first_is_outer else order:
            half = self.blocks.shape[-1] // 2
            rows = BlockRotation(self.blocks[i])(self._regroup(rows, 2, 2**i, half) if i else rows)
            rows = self._regroup(rows, 2**i, 2, half) if i else rows
        return rows

    @staticmethod
    def _regroup(rows: torch.Tensor, *sizes: int) -> torch.Tensor:
        return rows.unflatten(-1, (-1, *sizes)).transpose(-3, -2).flatten(-4)

    def transposed(self) -> "Butterfly":
        """Transpose each block and turn the order of the factors around."""
        return Butterfly(self.blocks.mT, not self.first_is_outer)


class FastBlockDiag(torch.autograd.Function):
    """Put blocks (z, n, b, b) on the diagonals of matrices (z, n b, n b), which are 0 elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        """
        Build the matrices.

        Args:
            input: blocks, (z, n, b, b).
        """
        count, size = input.shape[1], input.shape[-1]
        matrices = input.new_zeros(len(input), count, size, count, size)
        torch.diagonal(matrices, dim1=1, dim2=3).copy_(input.movedim(1, -1))
        return matrices.view(len(input), count * size, count * size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Note the sizes of the blocks."""
        ctx.sizes = inputs[0].shape[1], inputs[0].shape[-1]

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        """Treat the tangent as the blocks: the matrices are linear in them."""
        return FastBlockDiag.forward(tangent)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        """
        Take the blocks on the diagonals.

        Args:
            ctx: context of autograd.
            grad_output: (z, n b, n b)
        """
        count, size = ctx.sizes
        blocks = torch.diagonal(grad_output.reshape(-1, count, size, count, size), dim1=1, dim2=3)
        return blocks.movedim(-1, 1)


def get_fbd_cuda() -> None:
    """Give the compiled extension for block-diagonal matrices: there is none, and none is needed."""
    return


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """
    Set environment variables inside a context.

    Args:
        kwargs: name in any case -> value.

    Example:

        >>> import os
        >>> with patch_environment(peft_example=1):
        ...     os.environ["PEFT_EXAMPLE"]
        '1'
        >>> "PEFT_EXAMPLE" in os.environ
        False
    """
    before = {name.upper(): os.environ.get(name.upper()) for name in kwargs}
    os.environ.update({name.upper(): str(value) for name, value in kwargs.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class MultiplicativeDropoutLayer(nn.Module):
    """
    Dropout for products of rotations: while training, blocks of one factor become the identity.

    Args:
        p: share of the factor's blocks; the number is rounded down.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Replace blocks of a factor, both chosen at random.

        Args:
            x: blocks, (factors, n, b, b).

        Raises:
            PeftValueError: if the blocks are not square.
        """
        if x.shape[-1] != x.shape[-2]:
            raise PeftValueError(f"blocks must be square, found shape {tuple(x.shape)}")
        factors, count = x.shape[:2]
        dropped = int(self.p * count)
        if not self.training or dropped == 0:
            return x
        chosen = torch.rand(count, device=x.device).argsort() < dropped
        factor = torch.arange(factors, device=x.device) == torch.randint(factors, (1,), device=x.device)
        return torch.where((factor.unsqueeze(1) & chosen)[..., None, None], identity_like(x), x)


# ----------------------------------------------------------------------------------------------------------- layers
class BOFTLayer(RotationLayer):
    """
    BOFT on one layer.

    Attributes:
        boft_R: adapter name -> matrices whose skew-symmetric parts are the blocks' generators, (factors, n, b, b).
        boft_s: adapter name -> scale of each output.
        boft_block_size: adapter name -> features per block.
        boft_block_num: adapter name -> number of blocks.
        boft_dropout: adapter name -> dropout of blocks.
    """

    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")
    container_classes = {"boft_dropout": nn.ModuleDict}
    corrects_output = True

    def make_adapter(self, adapter_name: str, config: BOFTConfig, **kwargs: Any) -> None:
        """
        Make the blocks and the scale.

        Args:
            adapter_name: name.
            config: the adapter's config.
            kwargs: not used; kept for callers of the released package.

        Raises:
            PeftValueError: if the blocks do not fit into the layer, or for an unknown `init_weights`.
        """
        if not isinstance(config.init_weights, bool):
            raise PeftValueError(f"init_weights must be True or False, found {config.init_weights!r}")
        features, factors = self.rows_to_rotate(), _number_of_factors(config.boft_n_butterfly_factor)
        size = config.boft_block_size or features // config.boft_block_num
        count = features // max(size, 1)
        if size * count != features or config.boft_block_num not in (0, count):
            raise PeftValueError(
                f"boft_block_size={config.boft_block_size}, boft_block_num={config.boft_block_num} does not divide "
                f"the {features} features of a layer; choose one that does, or leave it out with exclude_modules"
            )
        _check_factors(factors, features, size)
        self.boft_R[adapter_name] = self.new_parameter(factors, count, size, size)
        self.boft_s[adapter_name] = self.new_parameter(*self.scale_shape())
        self.boft_block_size[adapter_name], self.boft_block_num[adapter_name] = size, count
        dropout = config.boft_dropout
        self.boft_dropout[adapter_name] = MultiplicativeDropoutLayer(dropout) if dropout > 0 else nn.Identity()

    def scale_shape(self) -> tuple[int, int]:
        """Give the shape of the scale."""
        return self.out_features, 1

    def reset_adapter(self, adapter_name: str, config: BOFTConfig) -> None:
        """Start as the identity, or at random."""
        self.reset_boft_parameters(adapter_name, config.init_weights)

    @changes_adapter
    def reset_boft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for the identity, False for a random rotation and scale.
        """
        std = 0.0 if init_weights else 0.1
        nn.init.normal_(self.boft_R[adapter_name], std=std)
        nn.init.normal_(self.boft_s[adapter_name], mean=1.0, std=std)

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make as many factors as a checkpoint has, since their number depends on the machine that wrote it."""
        found = {len(tensor) for key, tensor in tensors.items() if key.endswith("boft_R") and tensor.dim() == 4}
        if adapter_name not in self.boft_R or len(found) != 1:
            return
        present, factors = self.boft_R[adapter_name], found.pop()
        if factors != len(present):
            _check_factors(factors, self.rows_to_rotate(), present.shape[-1])
            take_adapter_out(self, adapter_name)  # which takes the factors that were merged
            data = present.data.new_empty(factors, *present.shape[1:])
            self.boft_R[adapter_name] = nn.Parameter(data, requires_grad=present.requires_grad)

    def rotation(self, adapter: str, training: bool = False) -> Butterfly:
        """Compute the blocks of an adapter; see `RotationLayer.rotation`."""
        generators = full_precision(self.boft_R[adapter])
        blocks = cayley((generators - generators.mT) / 2)
        return Butterfly(self.boft_dropout[adapter](blocks) if training else blocks)

    def get_delta_weight(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Build the matrix that rows of inputs are multiplied by. It is meant for looking at; nothing else needs it.

        Returns:
            The matrix, (features, features), and the scale.
        """
        return super().get_delta_weight(adapter), self.boft_s[adapter]

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Scale the outputs, but not the bias."""
        scale, bias = self.boft_s[adapter].flatten(), tensor_of(self.get_base_layer(), "bias")
        scaled = result * scale if bias is None else torch.addcmul(bias * (1 - scale), result, scale)
        return scaled.to(result.dtype)

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the weight, then scale them."""
        return super().transform_weight(adapter, weight) * self._scale_of_weight(adapter, weight)

    def forward_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the weight, with dropout in training, then scale them."""
        return super().forward_weight(adapter, weight) * self._scale_of_weight(adapter, weight)

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Undo the scaling, then rotate the rows of the weight back."""
        return super().inverse_weight(adapter, weight / self._scale_of_weight(adapter, weight))

    def can_unmerge(self, adapter: str) -> bool:
        """An output that was scaled by 0 cannot be brought back."""
        return not (self.boft_s[adapter] == 0).any()

    def _scale_of_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        scale = self.boft_s[adapter].flatten()
        return scale if stores_weight_transposed(self.get_base_layer()) else scale.view(-1, *[1] * (weight.dim() - 1))

    # -------------------------------------------------------------------- kept for callers of the released package
    def perm2mat(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Build a permutation matrix.

        Args:
            indices: column of the 1 in each row.
        """
        return torch.eye(len(indices), device=indices.device)[indices]

    def block_butterfly_perm(self, n: int, b: int, r: int = 3, n_butterfly_factor: int = 1) -> torch.Tensor:
        """
        Give the order in which a factor takes features: of each group first the even, then the odd chunks.

        Args:
            n: number of features.
            b: number of groups.
            r: features per chunk, half of a block.
            n_butterfly_factor: index of the factor; the first one, 0, leaves the order.

        Raises:
            PeftValueError: if the chunks do not fit into the groups in pairs.
        """
        if n_butterfly_factor == 0:
            return torch.arange(n)
        if n % (2 * b * r):
            raise PeftValueError(f"pairs of chunks of {r} do not fit into {b} groups of {n} features")
        return torch.arange(n).view(b, -1, 2, r).transpose(1, 2).flatten()

    def cayley_batch(self, data: torch.Tensor) -> torch.Tensor:
        """
        Turn square matrices into rotations, by their skew-symmetric parts.

        Args:
            data: (n, b, b)
        """
        return cayley((data - data.mT) / 2)


def _number_of_factors(wanted: int) -> int:
    """Give the number of factors that a new adapter has on this machine."""
    if wanted != 1 and not torch.cuda.is_available():
        warn(
            f"boft_n_butterfly_factor={wanted} is used as 1, since there is no CUDA device: the released package does "
            "the same, and adapters have the same shapes in both"
        )
        return 1
    return wanted


def _check_factors(factors: int, features: int, size: int) -> None:
    """Refuse factors that the features cannot be grouped for."""
    if factors < 1:
        raise PeftValueError(f"boft_n_butterfly_factor must be at least 1, found {factors}")
    if factors > 1 and (size % 2 or features % (size * 2 ** (factors - 1))):
        raise PeftValueError(
            f"boft_n_butterfly_factor={factors} with blocks of {size} needs an even block size and a number of "
            f"features divisible by {size * 2 ** (factors - 1)}, found {features}; use fewer factors or other blocks"
        )


class Linear(BOFTLayer, nn.Module):
    """BOFT on `nn.Linear` and transformers' `Conv1D`; see `BaseTunerLayer` for the arguments."""


class Conv2d(BOFTLayer, nn.Module):
    """BOFT on `nn.Conv2d`: what is rotated are the rows of the weight (out, in * kernel height * kernel width)."""

    transforms_input = False
    corrects_output = False

    def scale_shape(self) -> tuple[int, int]:
        """Give the shape of the scale."""
        return 1, self.out_features
