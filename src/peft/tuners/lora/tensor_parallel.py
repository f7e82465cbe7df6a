# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's factors on models that transformers has divided among processes (tensor parallelism with DTensors)."""

import re
from typing import TYPE_CHECKING

from torch import nn

from ...utils.error import PeftValueError


if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

# way in which a layer is divided -> dimension of its factors' weights that is divided along
_DIMENSIONS = {"colwise": 0, "rowwise": 1}


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
