# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Letting the methods of a wrapped model show the signatures of its base model, for tools that read them."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from ..utils.error import PeftValueError
from .wrapper import ModelWrapper


def update_forward_signature(model: ModelWrapper) -> None:
    """
    Let `model.forward` show the signature of the base model's forward method, where it has none of its own.

    Tools such as transformers' `Trainer` read it to find out which columns of a data set the model takes.

    Args:
        model: the model; its forward method does what it did before.

    Example:

        >>> import inspect
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.helpers import update_forward_signature
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> update_forward_signature(model)
        >>> list(inspect.signature(model.forward).parameters)
        ['input']
    """
    _show_signature(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: ModelWrapper) -> None:
    """
    Let `model.generate` show the signature of the base model's generate method, where it has none of its own.

    Args:
        model: the model; without a generate method in the base model nothing is done.
    """
    base = getattr(model.get_base_model(), "generate", None)
    if base is not None:
        _show_signature(model, "generate", base)


def update_signature(model: ModelWrapper, method: str = "all") -> None:
    """
    Let methods of a model show the signatures that the base model's methods have.

    Args:
        model: the model.
        method: "forward", "generate" or "all".

    Raises:
        PeftValueError: for any other method.
    """
    if method not in ("forward", "generate", "all"):
        raise PeftValueError(f"method={method!r} is not known; choose 'forward', 'generate' or 'all'")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show_signature(model: ModelWrapper, name: str, base: Callable) -> None:
    present = getattr(model, name)
    kinds = {parameter.kind for parameter in inspect.signature(present).parameters.values()}
    if kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it says itself what it takes
    own = getattr(type(model), name)

    # a function of the model, not a bound method, so that a copy of the model calls its own
    @functools.wraps(base)
    def with_signature(self: ModelWrapper, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    with_signature.__signature__ = _with_self(inspect.signature(base))
    setattr(model, name, MethodType(with_signature, model))


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    others = list(signature.parameters.values())
    positional_only = [p for p in others if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    return signature.replace(parameters=[itself, *positional_only, *others[len(positional_only) :]])
