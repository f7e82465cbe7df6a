# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Names without what wrappers put into them, and keys that are changed without losing a tensor.

torch.compile, FSDP and activation checkpointing hold the module that they wrap as a child of their own, so each name
below gets another part. Wrappers come and go; a name that is written to a file, or matched, must not depend on them.
"""

import re
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

from .error import PeftValueError


T = TypeVar("T")

# what the wrappers call the module inside them: torch.compile, FSDP, checkpoint_wrapper of torch.distributed
WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_ALTERNATIVES = "|".join(sorted(WRAPPED))
# dots may be escaped, since names also stand in regular expressions
_INNER = re.compile(rf"(?<!\w)(?:{_ALTERNATIVES})(?:\\?\.)")
_LAST = re.compile(rf"(?:^|\\?\.)(?:{_ALTERNATIVES})$")


def plain_name(name: str) -> str:
    """
    Take the parts out of a name, or of a regular expression for names, that wrappers have put into it.

    Args:
        name: name of a module, key of a state dict, or expression.

    Example:

        >>> from peft.utils.wrapped_names import plain_name
        >>> plain_name("_orig_mod.layers.0._fsdp_wrapped_module.weight")
        'layers.0.weight'
    """
    if "_orig_mod" not in name and "_wrapped_module" not in name:  # nearly all names
        return name
    return _LAST.sub("", _INNER.sub("", name))


def with_plain_names(value: T) -> T:
    """
    Do what `plain_name` does to a name, to each entry of a collection, or to each key of a mapping.

    Args:
        value: anything; what holds no such name is returned as it is.
    """
    if isinstance(value, str):
        return plain_name(value)
    if isinstance(value, Mapping):
        names = {key: with_plain_names(key) for key in value}
        return value if _same(names) else type(value)((names[key], content) for key, content in value.items())
    if isinstance(value, (list, tuple, Set)):
        names = {entry: plain_name(entry) for entry in value if isinstance(entry, str)}
        return value if _same(names) else type(value)(names.get(entry, entry) for entry in value)
    return value


def _same(names: Mapping[Any, Any]) -> bool:
    return all(old == new for old, new in names.items())


def renamed(tensors: Mapping[str, T], rename: Callable[[str], str], by: str = "") -> dict[str, T]:
    """
    Change the keys of a checkpoint.

    Args:
        tensors: key -> tensor.
        rename: old key -> new key.
        by: what changes them, for the message.

    Raises:
        PeftValueError: if two keys would become one, since one of the tensors would be lost.
    """
    result: dict[str, T] = {}
    origin: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = rename(key)
        if name in result:
            raise PeftValueError(
                f"two tensors of the checkpoint, {origin[name]!r} and {key!r}, both get the key {name!r}"
                f"{f' by {by}' if by else ''}, and one of them would be lost; nothing was loaded. Change the "
                "expressions of key_mapping, or the file, so that each tensor has a key of its own"
            )
        result[name], origin[name] = tensor, key
    return result
