# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
How LoRA's factors start: strategies by the value of `init_lora_weights`.

They are called without gradients and write to the factors in place.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ...utils.error import PeftNotImplementedError, PeftValueError


if TYPE_CHECKING:
    from .layer import LoraLayer


Initialization = Callable[["LoraLayer", str], None]

# named in the config's type, and part of later versions of this package
_PLANNED = ("eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")


def _uniform_by_fan_in(weight: nn.Parameter) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as `nn.Linear` does; weight is (out, in)."""
    bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
    weight.uniform_(-bound, bound)


def start_neutral(layer: "LoraLayer", adapter: str) -> None:
    """One factor at random, the other zero: the adapter changes nothing at first."""
    into, out = layer.factor_weights(adapter)
    if layer.is_embedding:
        into.zero_()
        out.normal_()
    else:
        _uniform_by_fan_in(into)
        out.zero_()


def start_gaussian(layer: "LoraLayer", adapter: str) -> None:
    """Like the neutral start, with factor A from N(0, 1/r^2)."""
    into, out = layer.factor_weights(adapter)
    if layer.is_embedding:
        into.zero_()
        out.normal_()
    else:
        into.normal_(std=1 / layer.r[adapter])
        out.zero_()


def start_random(layer: "LoraLayer", adapter: str) -> None:
    """Both factors at random, so that the adapter has an effect at once; for tests."""
    for weight in layer.factor_weights(adapter):
        if layer.is_embedding:
            weight.normal_()
        else:
            _uniform_by_fan_in(weight)


INITIALIZATIONS: dict[bool | str, Initialization] = {
    True: start_neutral,
    "gaussian": start_gaussian,
    False: start_random,
}


def find_initialization(name: bool | str | None) -> Initialization:
    """
    Find the strategy for a value of `init_lora_weights`.

    Args:
        name: the value; strings are compared without regard to case.

    Raises:
        PeftValueError: if no initialisation has that name.
        PeftNotImplementedError: if this version does not have it yet.
    """
    key = name.lower() if isinstance(name, str) else bool(name) if name is not None else True
    if key in INITIALIZATIONS:
        return INITIALIZATIONS[key]
    if str(key) in _PLANNED or str(key).startswith("pissa_niter_"):
        raise PeftNotImplementedError(
            f"init_lora_weights={name!r} is not part of this version; use True or 'gaussian'"
        )
    raise PeftValueError(
        f"init_lora_weights={name!r} is not known; choose one of {', '.join(map(repr, INITIALIZATIONS))}"
    )
