# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which layers of a model a start is going to be calibrated for, before there is an adapter."""

import copy
import warnings
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ....anatomy.skeletons import without_storage
from ....anatomy.view import viewing
from ....anatomy.walking import unwrapped
from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..model import LoraModel
from ..starts import find_start
from ..starts.base_weight import FromBaseWeight


class CalibrationTarget(NamedTuple):
    """
    A linear layer that is going to get factors of its own.

    Attributes:
        layer: the layer of the base model.
        rank: rank of its factors.
    """

    layer: nn.Module
    rank: int


def find_calibration_targets(model: nn.Module, config: LoraConfig) -> dict[str, CalibrationTarget]:
    """
    Find the linear layers that an adapter would get factors for, as its injection would.

    Whatever the injection would refuse is refused here, before the model is run. Layers that follow a tied one have no
    factors of their own, so a shared weight is calibrated once, by the inputs of the layer that owns it.

    Args:
        model: base model; it is not changed.
        config: config of the adapter; it is not changed.

    Returns:
        Full name -> target, in the model's order.

    Raises:
        PeftValueError: if there is none, or the model does not allow for the adapter.
        PeftTypeError: if a weight is of a type that the start cannot use.
    """
    plain = copy.copy(config)
    plain.init_lora_weights = True  # what the start itself asks for is what is prepared here
    skeleton = without_storage(model)
    with warnings.catch_warnings(), viewing(skeleton) as view:
        warnings.simplefilter("ignore")  # the injection is going to say it
        plan = LoraModel(skeleton, {}, "default").plan_adapter(view, "default", plain)
    found = {}
    for target in plan.targets:
        if target.parameter is None and target.owner is None:
            layer = unwrapped(model.get_submodule(target.name))
            if isinstance(layer, (nn.Linear, Conv1D)):
                found[target.name] = CalibrationTarget(layer, target.arguments["r"])
    if not found:
        raise PeftValueError(
            f"init_lora_weights={config.init_lora_weights!r} is calibrated for linear layers, and none is among the "
            f"targets ({', '.join(plan.names)}); choose other target_modules, or another initialisation"
        )
    start = find_start(config.init_lora_weights, config)
    for name, target in found.items() if isinstance(start, FromBaseWeight) else ():
        refusal = start.refusal_of_weight(target.layer, target.rank)
        if refusal is not None:
            raise type(refusal)(f"{name!r}: {refusal}")
    return found
