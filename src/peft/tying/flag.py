# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The flag `tie_word_embeddings` of configs of transformers, and what models read it for."""

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..utils.same_tensor import identity_of


FLAG = "tie_word_embeddings"


def configs_that_tie(module: nn.Module) -> list[Any]:
    """Give the configs of a module, nested ones too, that say that embeddings are tied."""
    config = getattr(module, "config", None)
    text = getattr(config, "text_config", None)
    return [c for c in (config, text) if getattr(c, FLAG, False)]


def computes_with_flag(model: nn.Module) -> bool:
    """
    Say whether a model computes something else if its config says that embeddings are not tied.

    Models of the kind of T5 scale what goes into the head if the flag is set. What a forward pass reads is told from
    its code, and that of the methods that it calls, so no input has to be made up.

    Args:
        model: the base model.
    """
    return any(_reads_flag(cls) for cls in {type(module) for module in model.modules() if configs_that_tie(module)})


def ties_without_flag(model: nn.Module) -> bool:
    """
    Say whether embedding and head are one tensor although the config says that they are two, and nothing reads that.

    ms-swift, for one, clears the flag before it merges an adapter that has trained both.

    Args:
        model: the base model.
    """
    if getattr(getattr(model, "config", None), FLAG, None) is not False or any(map(configs_that_tie, model.modules())):
        return False
    if any(_reads_flag(cls) for cls in {type(module) for module in model.modules() if hasattr(module, "config")}):
        return False
    ends = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    one, other = (getattr(end, "weight", None) for end in ends)
    return one is not None and other is not None and identity_of(one) == identity_of(other)


def _reads_flag(cls: type) -> bool:
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        function = inspect.unwrap(getattr(cls, method)) if callable(getattr(cls, method, None)) else None
        if method in seen or not isinstance(function, types.FunctionType):
            continue
        seen.add(method)
        names = set(_names_in(function.__code__))
        if FLAG in names:
            return True
        waiting += names
    return False


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the attributes and globals that code names, that of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def forget_declared_ties(model: nn.Module) -> set[str]:
    """
    Let a model of transformers no longer declare ties that it does not have.

    The flag of its config stays, and would tie them again. A model that is read from files is asked the same by
    transformers itself, from version 5 on: members with different values in the files stay apart.

    Args:
        model: the base model, without adapters.

    Returns:
        Full names of parameters that are no longer declared to be tied to another one.
    """
    forgotten = set()
    for prefix, module in model.named_modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            declared = getattr(module, name, None)
            if isinstance(declared, Mapping) and declared:
                held = dict(module.named_parameters(remove_duplicate=False))
                apart = {key for key, other in declared.items() if _are_two(held.get(key), held.get(other))}
                setattr(module, name, {key: other for key, other in declared.items() if key not in apart})
                forgotten |= {f"{prefix}.{key}" if prefix else key for key in apart}
    return forgotten


def _are_two(one: nn.Parameter | None, other: nn.Parameter | None) -> bool:
    return one is not None and other is not None and identity_of(one) != identity_of(other)
