# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where a model takes its cache of keys and values, and where it gives it back: transformers 5.24 renamed both."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


# newest first; models with code of their own go on with the older name
CACHE_NAMES = ("cache", "past_key_values")


def cache_parameter(module: nn.Module) -> str | None:
    """
    Find the name under which a module's forward takes a cache.

    Args:
        module: a model or a part of one.

    Returns:
        The name; None if it takes none by name.
    """
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """
    Read the cache among the arguments of a call, or the fields of an output.

    Args:
        arguments: name -> value.

    Returns:
        The cache; None if there is none.
    """
    values = dict(arguments)  # asked for its older name, an output of transformers 5.24 logs that this is deprecated
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)
