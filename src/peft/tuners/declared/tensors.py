# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a declaration says of its tensors, and how its functions see them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, features, has_outputs_last
from ...anatomy.offload import tensor_of
from ...utils.quantization_utils import resolve_quantization_backend, stored_weight


class Shape(tuple):
    """
    Shape of a weight as a matrix, (out, in), whatever the kind of layer; kernels are counted among the inputs.

    Args:
        out: rows of the matrix, output features.
        inputs: columns, input features.
        layer: the base layer.
        read: gives the base weight without adapters as a matrix; left out where there is no layer with adapters yet.
    """

    layer: nn.Module

    def __new__(
        cls, out: int, inputs: int, layer: nn.Module, read: Callable[[], torch.Tensor] | None = None
    ) -> "Shape":
        """Make a pair that knows its layer."""
        shape = super().__new__(cls, (out, inputs))
        shape.layer, shape._read = layer, read
        return shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel; empty for layers that are not convolutions."""
        return self.layer.kernel_size if isinstance(self.layer, CONVOLUTIONS) else ()

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, 1 for other layers."""
        return getattr(self.layer, "groups", 1)

    @property
    def features(self) -> tuple[int, int]:
        """Numbers of output and input features; of convolutions, of channels."""
        if isinstance(self.layer, CONVOLUTIONS):
            return self.layer.out_channels, self.layer.in_channels
        return self[0], self[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the base layer stores its weight."""
        return stored_weight(self.layer).dtype

    @property
    def weight(self) -> torch.Tensor:
        """The weight without adapters, (out, in), without gradients; dense if the layer is quantised."""
        if self._read is not None:
            return self._read().detach()
        backend = resolve_quantization_backend(self.layer)
        weight = tensor_of(self.layer, "weight") if backend is None else backend.get_base_weight(self.layer)
        return as_rows(self.layer, weight.detach())


def as_rows(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """
    Give a weight of a layer's layout as a matrix, (out, in).

    Args:
        layer: a layer of the base model.
        weight: its weight, or another tensor of that shape.
    """
    return weight.T if has_outputs_last(layer) else weight.flatten(1) if weight.dim() > 2 else weight


def shape_of(layer: nn.Module) -> Shape:
    """
    Give the shape of a layer's weight as a matrix.

    Args:
        layer: a layer of the base model.
    """
    return _matrix_shape(layer, *features(layer))


def _matrix_shape(
    layer: nn.Module, inputs: int, outputs: int, read: Callable[[], torch.Tensor] | None = None
) -> Shape:
    if isinstance(layer, CONVOLUTIONS):
        inputs = inputs // layer.groups * math.prod(layer.kernel_size)
    return Shape(outputs, inputs, layer, read)


class Tensors:
    """
    The tensors, and modules of tensors, of one adapter in one layer; None for one that the adapter does not have.

    Args:
        layer: the layer that has them.
        adapter: name.
    """

    __slots__ = ("_adapter", "_layer")

    def __init__(self, layer: Any, adapter: str) -> None:
        self._layer, self._adapter = layer, adapter

    def __getattr__(self, name: str) -> Any:
        attribute = self._layer.tensor_names.get(name)
        if attribute is None:
            raise AttributeError(f"{type(self._layer).__name__} declares no tensor {name!r}")
        # what nn.Module does to find attributes would cost more than small layers take to compute
        layer, adapter = self._layer, self._adapter
        container = layer._modules.get(attribute)
        if container is None:
            return layer.frozen(adapter, name)
        found = container._parameters.get(adapter)
        if found is None:
            found = container._buffers.get(adapter)
        if found is None:
            found = container._modules.get(adapter)
            if found is not None and name in layer.group_fields:
                return found[str(getattr(layer.settings[adapter], layer.group_fields[name]))]
        return found


@dataclass(frozen=True)
class Trained:
    """
    A tensor that is trained and saved.

    Attributes:
        shape: its shape.
        start: what it starts with: a number, or a function that writes into the tensor, such as `nn.init.normal_`.
        rounded_to: type, such as that of the base weight, in which that is no other number, although the tensor may
            have more digits. Then it is drawn in float32. Types of whole numbers do not count.
    """

    shape: tuple[int, ...]
    start: float | Callable[[torch.Tensor], Any] = 0.0
    rounded_to: torch.dtype | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The one shape."""
        return (self.shape,)

    def fill(self, tensor: torch.Tensor) -> None:
        """Give a tensor the values that it starts with."""
        if self.rounded_to is None or not self.rounded_to.is_floating_point:
            self._write(tensor)
            return
        values = torch.empty_like(tensor, dtype=torch.float32)
        self._write(values)
        tensor.copy_(values.to(self.rounded_to))

    def _write(self, tensor: torch.Tensor) -> None:
        self.start(tensor) if callable(self.start) else tensor.fill_(self.start)


@dataclass(frozen=True)
class TrainedModule:
    """
    Trained tensors in a module of their own, for methods whose checkpoints have keys such as `oft_R.weight`.

    Attributes:
        make: gives the module; its parameters are replaced by ones of the device and type that the layer calls for.
        start: writes into its parameters what they start with.
        shapes: shapes of parameters about which the config decides; those that cannot be meant are refused before.
    """

    make: Callable[[], nn.Module]
    start: Callable[[nn.Module], Any]
    shapes: tuple[tuple[int, ...], ...] = ()

    def fill(self, module: nn.Module) -> None:
        """Give the module's parameters the values that they start with."""
        self.start(module)


def trained_linear(inputs: int, outputs: int, start: Callable[[torch.Tensor], Any]) -> TrainedModule:
    """
    Tell a trained matrix that is kept as a linear layer, so that its key ends in `.weight`.

    Args:
        inputs: columns.
        outputs: rows.
        start: writes into the matrix what it starts with.
    """
    make = partial(nn.Linear, inputs, outputs, bias=False, device="meta")
    return TrainedModule(make, lambda module: start(module.weight), ((outputs, inputs),))


@dataclass(frozen=True)
class Frozen:
    """
    A tensor that is made anew from the config whenever it is needed, such as from a seed: not trained, not saved.

    Attributes:
        make: gives the tensor, on the CPU. What is a floating point number gets the type of the adapter.
        shape: its shape, where the config decides about it; sizes that cannot be meant are refused before it is made.
        rounded: whether it has no more digits than the base weight, although the adapter may have more.
    """

    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...] | None = None
    rounded: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The one shape, if the config decides about it."""
        return () if self.shape is None else (self.shape,)

    def made(self, weight: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """
        Make the tensor.

        Args:
            weight: base weight that it belongs to.
            device: where it is to be.
            dtype: its type, if it is a floating point number.
        """
        tensor = self.make()
        if not tensor.is_floating_point():
            return tensor.to(device)
        if self.rounded and weight.is_floating_point() and weight.dtype.itemsize > 1:
            tensor = tensor.to(weight.dtype)
        return tensor.to(device, dtype)


@dataclass(frozen=True)
class Kept(Frozen):
    """A tensor that is saved, but not trained."""
