# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors of which several processes hold a part each (torch's DTensor), as in transformers' tensor parallelism."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


@dataclass
class TpInfo:
    """
    How a model is divided among processes.

    Attributes:
        tp_plan: name of a module, with `*` for the indices of layers -> name of the way in which it is divided.
        device_mesh: the processes.
        tp_size: how many there are.
    """

    tp_plan: dict[str, str]
    device_mesh: "DeviceMesh"
    tp_size: int


def is_divided(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is a DTensor, without importing what makes them."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """
    Make a DTensor of this process's part, divided as another one is.

    Args:
        local_tensor: this process's part, of the shape that it has in `ref`.
        ref: a DTensor, which says the processes, the division and the shape of the whole.

    Returns:
        The DTensor; it shares its memory with `local_tensor`.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local_tensor, ref.device_mesh, ref.placements, run_check=False, shape=ref.shape, stride=ref.stride()
    )


def distribute_like(whole: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """
    Divide a tensor among processes as another one is.

    Args:
        whole: the tensor, of which every process has all; gradients flow back to it.
        ref: a DTensor of the same shape.
    """
    from torch.distributed.tensor import DTensor, Replicate

    copies = [Replicate()] * ref.device_mesh.ndim
    whole = whole.to(ref.device_mesh.device_type)
    return DTensor.from_local(whole, ref.device_mesh, copies, run_check=False).redistribute(placements=ref.placements)


def divide_like(tensors: dict[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """
    Divide tensors among processes as the parameters are that they are for.

    Args:
        tensors: name -> whole tensor; those that are to be divided are replaced.
        parameters: name -> parameter.
    """
    for name in [name for name, parameter in parameters.items() if name in tensors and is_divided(parameter)]:
        if not is_divided(tensors[name]):
            tensors[name] = distribute_like(tensors[name], parameters[name])
