# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The method `tie_weights` of models of transformers, once adapters are in them.

It looks modules up by the names that they have in the base model, and gives one the parameter of another. With adapter
modules in their places it finds nothing, or raises. So it gets to see the base model.
"""

import functools
from typing import Any

from torch import nn

from ..anatomy.walking import base_modules, without_adapters
from ..layers.merging.sharing import merging_layers
from ..layers.merging.state import original_weights
from .resizing import resize_vocabulary


def shield_tie_weights(model: nn.Module) -> None:
    """
    Let a model that holds adapters, and models inside it, tie the weights of the base model when they are told to tie,
    and resize its vocabulary together with what adapters hold for each token.

    Args:
        model: the base model, with adapters in it.
    """
    for module in base_modules(model):
        if hasattr(type(module), "tie_weights"):
            module.__dict__["tie_weights"] = functools.partial(_tie_base_weights, module)
        if hasattr(type(module), "resize_token_embeddings"):
            module.__dict__["resize_token_embeddings"] = functools.partial(resize_vocabulary, module)


def unshield_tie_weights(model: nn.Module) -> None:
    """Undo `shield_tie_weights`, after the adapters have been taken out."""
    for module in base_modules(model):
        module.__dict__.pop("tie_weights", None)
        module.__dict__.pop("resize_token_embeddings", None)


def _tie_base_weights(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with original_weights(merging_layers(module)), without_adapters(module):
        return type(module).tie_weights(module, *args, **kwargs)
