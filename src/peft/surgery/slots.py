# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Replacing modules wherever a model holds them."""

import functools
import gc
from collections.abc import Callable
from typing import Any

from torch import nn

from ..anatomy.view import view_of


def without_collecting(function: Callable) -> Callable:
    """
    Pause the garbage collector while a function makes many modules.

    All of them stay, and the collector would scan the growing model again and again to find that out.
    """

    @functools.wraps(function)
    def paused(*args: Any, **kwargs: Any) -> Any:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return paused


class Slots:
    """
    Every place of a model that holds a module.

    One module object may stand in several places; whoever replaces it has to do so in all of them.

    Args:
        model: the model. Places inside adapter modules count too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._view = view_of(model)

    def place_of(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Give the first place that holds a module: parent and key in it."""
        return self._view.places(module)[0]

    def replaced(self, old: nn.Module, new: nn.Module) -> None:
        """Note that somebody else has put `new` where `old` was."""
        self._view.replaced(old, new)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` is held."""
        for parent, key in self._view.places(old):
            parent._modules[key] = new
        self._view.replaced(old, new)
