# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors of which several processes hold a part each (torch's DTensor), as in transformers' tensor parallelism."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .error import PeftValueError


if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

# way in which a layer is divided -> dimension of its factors' weights that is divided along
_DIMENSIONS = {"colwise": 0, "rowwise": 1}


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


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> "tuple[str | None, DeviceMesh | None]":
    """
    Say how a module of a model is divided among processes.

    Args:
        model: a base model.
        current_key: full name of the module.

    Returns:
        Name of the way, and the processes; None for both if it is not divided.
    """
    mesh, plan = getattr(model, "_device_mesh", None), getattr(model, "tp_plan", None)
    if mesh is None or not plan:
        return None, None
    way = plan.get(current_key) or plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", current_key))
    return (None, None) if way is None else (way, mesh)


def add_lora_tp_hooks_dtensor(
    tp_module: nn.Module, tp_plan_name: str, device_mesh: "DeviceMesh", *, base_layer: nn.Module, module_name: str
) -> None:
    """
    Divide the parameters of a factor among processes as those of its base layer are.

    Args:
        tp_module: the factor: B of a layer that is divided by its outputs, A of one that is divided by its inputs.
        tp_plan_name: how the base layer is divided, `"colwise"` or `"rowwise"`.
        device_mesh: the processes.
        base_layer: the base layer.
        module_name: its full name, for messages.

    Raises:
        PeftValueError: for other ways.
    """
    if tp_plan_name not in _DIMENSIONS:
        raise PeftValueError(
            f"{module_name!r} ({type(base_layer).__name__}) is divided among processes by {tp_plan_name!r}, and LoRA "
            f"knows {' and '.join(_DIMENSIONS)}; leave it out of target_modules"
        )
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, parameter in list(tp_module.named_parameters(recurse=False)):
        dimension = _DIMENSIONS[tp_plan_name]
        # a bias has the outputs alone
        placement = Shard(dimension) if dimension < parameter.dim() else Replicate()
        divided = distribute_tensor(parameter.detach(), device_mesh, [placement])
        setattr(tp_module, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))


class _LoraParameterProxy(nn.Module):
    """
    Add a delta to a parameter, as a parametrization of torch does, where one of both is divided among processes.

    Args:
        delta_weight: what is added.
    """

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """Give the sum, divided as the one is that is."""
        delta = self.delta_weight
        if is_divided(W) and not is_divided(delta):
            delta = distribute_like(delta, W)
        elif is_divided(delta) and not is_divided(W):
            W = distribute_like(W, delta)  # noqa: N806
        return W + delta


class LoraEmbeddingATPHolder(nn.Embedding):
    """
    Factor A of an embedding as an embedding, which tensor parallelism knows how to divide among processes.

    Args:
        weight: (rank, num_embeddings); it is held itself, as (num_embeddings, rank).

    Example:

        >>> import torch
        >>> from peft.tuners.lora.layer import LoraEmbeddingATPHolder
        >>> factor = torch.nn.Parameter(torch.eye(2, 3))
        >>> LoraEmbeddingATPHolder(factor)(torch.tensor([1])).tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, weight: torch.Tensor) -> None:
        rank, count = weight.shape
        super().__init__(count, rank, _weight=weight.detach().T, _freeze=not weight.requires_grad)
