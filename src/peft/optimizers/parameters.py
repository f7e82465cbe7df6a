# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which parameters of a model an optimiser is to have."""

from typing import Any

from torch import nn

from ..utils.error import PeftValueError
from ..utils.same_tensor import identity_of


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    Find the parameters that are trained, each tensor once, however many names it has.

    Args:
        model: any model.

    Returns:
        Name -> parameter, in the order of `named_parameters`.

    Raises:
        PeftValueError: if there is none.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(identity_of(parameter), (name, parameter))
    if not found:
        raise PeftValueError(
            f"nothing in this {type(model).__name__} is trained, so there is nothing to optimise; add an adapter, or "
            "activate one that is not frozen"
        )
    return dict(found.values())


def check_setting(name: str, value: Any, least: float = 0.0, below: float = float("inf")) -> None:
    """
    Refuse a setting of an optimiser that is no number, or out of range.

    Args:
        name: what the user calls it.
        value: what was given; tensors of one element will do.
        least: the smallest number that works.
        below: the first one that does not.

    Raises:
        PeftValueError: in these cases.
    """
    try:
        in_range = least <= value < below
    except TypeError:
        in_range = False
    if not in_range:
        limit = "" if below == float("inf") else f" and less than {below}"
        raise PeftValueError(f"{name} must be a number of at least {least}{limit}, found {value!r}")
