# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Making the declared tensors that layers share."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ...anatomy.offload import computing_device
from ...layers.buffer_dict import BufferDict
from ...layers.new_tensors import check_size, new_parameter
from ...utils.quantization_utils import stored_weight
from .tensors import Frozen, Kept, Shape, Trained


class SharedPlace(NamedTuple):
    """
    Where and in which type tensors are that layers share.

    Attributes:
        first: weight of the first of these layers, which decides about the type.
        largest: the largest of their weights, which says what sizes can be meant.
        device: where they are.
    """

    first: torch.Tensor
    largest: torch.Tensor
    device: torch.device

    @classmethod
    def of(cls, shapes: Iterable[Shape]) -> "SharedPlace":
        """
        Find the place for tensors that some layers share.

        Args:
            shapes: shapes of the layers' weights, at least one.
        """
        layers = [shape.layer for shape in shapes]
        weights = [stored_weight(layer) for layer in layers]
        return cls(weights[0], max(weights, key=torch.Tensor.numel), computing_device(layers[0], weights[0]))

    def check(self, spec: Trained | Frozen) -> None:
        """
        Refuse a tensor that cannot be meant.

        Args:
            spec: what it is.
        """
        dtype = new_parameter(self.first, 0).dtype
        for shape in spec.shapes:
            check_size(shape, self.largest, dtype, self.device)

    def put(self, container: nn.ParameterDict | BufferDict, key: str, spec: Trained | Frozen) -> None:
        """
        Make a tensor, for real always: a checkpoint may lack what layers share.

        Args:
            container: where it goes.
            key: its name there.
            spec: what it is.
        """
        dtype = new_parameter(self.first, 0).dtype
        if isinstance(spec, Trained):
            parameter = nn.Parameter(torch.empty(*spec.shape, dtype=dtype, device=self.device))
            spec.fill(parameter)
            container[key] = parameter
        else:
            put = getattr(container, "put_once", container.put)
            put(key, spec.made(self.first, self.device, dtype), isinstance(spec, Kept))
