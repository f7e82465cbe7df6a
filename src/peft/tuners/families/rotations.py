# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What OFT, BOFT and HRA share: matrices that are multiplied from the right without being built, and their rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import stores_weight_transposed
from ...anatomy.offload import tensor_of
from ...config import PeftConfig
from ...layers.scaling import Unscaled
from ...utils.error import PeftNotImplementedError, PeftValueError
from ..declared.layers import DeclaredWeight


# ------------------------------------------------------------------------------------------------------------- math
def identity_like(matrices: torch.Tensor) -> torch.Tensor:
    """Give the identity that matrices (..., b, b) can be added to."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Bring half precision to float32: decompositions have no other, and products of rotations need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """
    Turn skew-symmetric matrices into rotations: (I - Q) (I + Q)^-1.

    Args:
        skew: Q, (..., b, b).
    """
    identity = identity_like(skew)
    return torch.linalg.solve(identity + skew, identity - skew)  # the two factors commute


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
        series = torch.baddbmm(identity, skew, series)
    return torch.bmm(factor, series)


class Rotation(ABC):
    """A square matrix that rows are multiplied by, from the right."""

    @abstractmethod
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features), in the precision of the rotation."""

    @abstractmethod
    def transposed(self) -> "Rotation":
        """Give the transposed matrix."""

    def inverse(self) -> "Rotation":
        """Give the inverse, which is the transpose where the matrix is orthogonal."""
        return self.transposed()


@dataclass(frozen=True)
class BlockRotation(Rotation):
    """
    A block-diagonal matrix.

    Args:
        blocks: (features / b, b, b), or (1, b, b) if all are the same one.
    """

    blocks: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features)."""
        shape, (count, size, _) = rows.shape, self.blocks.shape
        rows = rows.to(self.blocks.dtype)
        if count == 1:
            return (rows.reshape(-1, size) @ self.blocks[0]).view(shape)
        rows = rows.reshape(-1, count, size).transpose(0, 1)
        return torch.bmm(rows, self.blocks).transpose(0, 1).reshape(shape)

    def transposed(self) -> "BlockRotation":
        """Transpose each block."""
        return BlockRotation(self.blocks.mT)

    def inverse(self) -> "BlockRotation":
        """Invert each block; those of a Neumann series are not quite orthogonal."""
        return BlockRotation(torch.linalg.inv(self.blocks))


# ------------------------------------------------------------------------------------------------------------ layers
def check_start(config: PeftConfig) -> None:
    """Refuse a start that is neither without a turn nor at random."""
    if not isinstance(config.init_weights, bool):
        raise PeftValueError(f"init_weights must be True or False, found {config.init_weights!r}")


class RotationLayer(Unscaled, DeclaredWeight):  # a rotation by half the angle is another method
    """
    Rule for methods that rotate the input of a layer: f(W) x = W g(x), where g multiplies rows of inputs by a matrix.

    A method supplies `rotation(t, shape, c, training)`. For convolutions it is the weight, with one row per output
    channel, that is rotated; of embeddings the rows that are looked up.
    """

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        # asked in each forward pass, and the kind of the base layer does not change
        base = self.get_base_layer()
        self.__dict__.update(
            transforms_input=not isinstance(base, (nn.Conv2d, nn.Embedding)),
            corrects_output=isinstance(base, nn.Embedding),
        )

    @classmethod
    def prepare_adapter(cls, base: nn.Module, config: PeftConfig, **arguments: Any) -> Mapping[str, Any]:
        """
        Refuse a convolution in groups; see `BaseTunerLayer.prepare_adapter`.

        Raises:
            PeftNotImplementedError: for such a one.
        """
        if isinstance(base, nn.Conv2d) and base.groups > 1:
            raise PeftNotImplementedError(
                f"{cls.__name__} cannot rotate the inputs of a Conv2d with groups={base.groups}, since each "
                "group sees inputs of its own; leave the layer out with exclude_modules, or use another method"
            )
        return super().prepare_adapter(base, config, **arguments)

    def rotation(self, adapter: str, training: bool = False) -> Rotation:
        """
        Give what rows of inputs are multiplied by.

        Args:
            adapter: name.
            training: whether dropout is to be applied.
        """
        return self.declared.rotation(self.tensors(adapter), self.shape, self.settings[adapter], training)

    def weight_rotation(self, adapter: str, training: bool = False) -> Rotation:
        """Give what the rows of the weight are multiplied by: the transpose, as (x R) W' = x (W R')'."""
        rotation = self.rotation(adapter, training)
        return rotation if isinstance(self.get_base_layer(), nn.Embedding) else rotation.transposed()

    def rows_to_rotate(self) -> int:
        """Give the number of features that are rotated: inputs, one per entry of a kernel; outputs of embeddings."""
        base = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            return self.out_features
        if not isinstance(base, nn.Conv2d):
            return self.in_features
        return base.in_channels * base.kernel_size[0] * base.kernel_size[1]

    def get_delta_weight(self, adapter: str, *options: Any) -> torch.Tensor:
        """
        Build the matrix that rows of inputs are multiplied by. It is meant for looking at; nothing else needs it.

        Returns:
            (features, features)
        """
        parameter = next(self.adapter_parameters(adapter))
        return self.rotation(adapter)(torch.eye(self.rows_to_rotate(), dtype=parameter.dtype, device=parameter.device))

    def transform_input(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Rotate the inputs."""
        return self.rotation(adapter, self.training)(x)

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Rotate what was looked up."""
        return self.source(adapter).weight_rotation(adapter, self.training)(result).to(result.dtype)

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the rotation can be undone, as rotations can."""
        return True

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the weight."""
        return self._rotate_rows(weight, self.weight_rotation(adapter))

    def forward_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the weight, with dropout in training."""
        return self._rotate_rows(weight, self.weight_rotation(adapter, self.training))

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the weight back."""
        return self._rotate_rows(weight, self.weight_rotation(adapter).inverse())

    def _rotate_rows(self, weight: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        if stores_weight_transposed(self.get_base_layer()):
            return rotation(weight.T).T
        return rotation(weight.flatten(1)).view_as(weight)


class ScaledRotationLayer(RotationLayer):
    """Rule for methods that scale the outputs after that, by the factors `s` of each: f(W) x = s W g(x)."""

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        # where the input is rotated apart from the weight, the output is scaled apart from it
        self.__dict__["corrects_output"] = self.transforms_input

    def get_delta_weight(self, adapter: str, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Build the matrix that rows of inputs are multiplied by. It is meant for looking at; nothing else needs it.

        Returns:
            The matrix, (features, features), and the scale.
        """
        return super().get_delta_weight(adapter), self.tensors(adapter).s

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Scale the outputs, but not the bias."""
        scale, bias = self.tensors(adapter).s.flatten(), tensor_of(self.get_base_layer(), "bias")
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
        return not (self.tensors(adapter).s == 0).any()

    def _scale_of_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        scale = self.tensors(adapter).s.flatten()
        return scale if stores_weight_transposed(self.get_base_layer()) else scale.view(-1, *[1] * (weight.dim() - 1))
