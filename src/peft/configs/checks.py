# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Checks of the values that users give to fields."""

import dataclasses
import inspect
import numbers
import typing
from collections.abc import Iterable
from functools import cache
from types import NoneType, UnionType
from typing import Any

from ..utils.error import PeftTypeError, PeftValueError
from ..utils.near_names import did_you_mean, nearest
from ..utils.patterns import compiled


# fields that choose layers by index
LAYER_FIELDS = ("layers_to_transform", "layers_pattern")


def check_layer_selection(
    config: Any, refused_with_pattern: Iterable[str] = LAYER_FIELDS, *, pattern_needs_indices: bool = True
) -> None:
    """
    Check the fields that choose layers by index, and turn lists of names into sets.

    Args:
        config: a config with `target_modules`; `layers_to_transform` and `layers_pattern` if it has them.
        refused_with_pattern: fields that the method does not allow where `target_modules` is a regular expression.
        pattern_needs_indices: whether `layers_pattern`, which alone does nothing, is refused alone.

    Raises:
        ValueError: if the fields contradict each other, or a pattern is not a regular expression.
    """
    check_targets(config)
    if isinstance(config.target_modules, str):
        for name in refused_with_pattern:
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{name} has no effect where target_modules is a regular expression; choose the layers in "
                    "target_modules itself, or give target_modules as a list"
                )
    if pattern_needs_indices and getattr(config, "layers_pattern", None) and config.layers_to_transform is None:
        raise ValueError("layers_pattern was given without layers_to_transform; give the indices of the layers too")


def check_targets(config: Any) -> None:
    """
    Check the fields that choose modules by name, and turn lists of names into sets.

    Args:
        config: a config with `target_modules`, with or without `exclude_modules`.

    Raises:
        ValueError: if a pattern is not a regular expression.
        TypeError: if a value is neither a pattern nor a list of names.
    """
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str):
            check_names(name, value)
        if isinstance(value, (list, tuple)):
            setattr(config, name, set(value))
        elif isinstance(value, str):
            check_pattern(name, value)


def check_names(name: str, value: Any) -> None:
    """Check that a field holds a collection of names."""
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"{name} must be a list of names, found {value!r}")


def check_types(config: Any, expected: dict[str, tuple[type, ...]]) -> None:
    """
    Check that fields hold what they are declared as.

    Args:
        config: a config.
        expected: field -> types that it may have; None is always allowed.

    Raises:
        TypeError: for the first field that does not fit.
    """
    for name, types in expected.items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, types):
            names = " or ".join(kind.__name__ for kind in types)
            raise TypeError(f"{name} must be {names}, found {value!r}")


def check_plain_types(config: Any) -> None:
    """
    Check that fields which are declared as numbers, texts and dictionaries hold such; None is always allowed.

    Args:
        config: a config.

    Raises:
        PeftTypeError: for the first field that does not fit.
    """
    for name, types in _plain_fields(type(config)).items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, types):
            names = " or ".join(_NAMES[kind] for kind in types)
            raise PeftTypeError(f"{name} must be {names}, found {value!r}")


# numbers of numpy are such, too
_NAMES = {numbers.Integral: "an integer", numbers.Real: "a number", str: "a text", dict: "a dictionary"}


@cache
def _plain_fields(config_cls: type) -> dict[str, tuple[type, ...]]:
    """Give the types that the values of fields may have, for those that hold nothing else than these."""
    found = {}
    for f in dataclasses.fields(config_cls):
        # classes of users may have annotations that are texts; of switches any value can be the position
        if not isinstance(f.type, str) and f.type is not bool:
            types = _plain_types(float if "alpha" in f.name and f.type is int else f.type)
            if types:
                found[f.name] = tuple(dict.fromkeys(types))
    return found


def _plain_types(hint: Any) -> list[type]:
    """Give the types that an annotation stands for; none if there are others among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        parts = [_plain_types(argument) for argument in arguments if argument is not NoneType]
        return [kind for part in parts for kind in part] if all(parts) else []
    if origin is typing.Literal:
        return [kind for argument in arguments for kind in _plain_types(type(argument))]
    kinds = {int: numbers.Integral, bool: numbers.Integral, float: numbers.Real, str: str, dict: dict}
    kind = kinds.get(origin or hint)
    return [] if kind is None else [kind]


def check_share(config: Any, name: str) -> None:
    """
    Check that a field holds a number from 0 to 1.

    Args:
        config: a config.
        name: the field.

    Raises:
        PeftValueError: if it does not.
    """
    if not 0 <= getattr(config, name) <= 1:
        raise PeftValueError(f"{name} must lie between 0 and 1, found {getattr(config, name)}")


def check_counts(config: Any, *names: str) -> None:
    """
    Check that fields hold integers from 1 on.

    Args:
        config: a config.
        names: the fields.

    Raises:
        PeftValueError: for the first that does not.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value <= 0:
            raise PeftValueError(f"{name} must be a positive integer, found {value!r}")


def check_magnitudes(config: Any, *names: str) -> None:
    """
    Check that fields hold numbers from 0 on.

    Args:
        config: a config.
        names: the fields.

    Raises:
        PeftValueError: if one does not.
    """
    values = {name: getattr(config, name) for name in names}
    if min(values.values()) < 0:
        found = " and ".join(f"{name}={value}" for name, value in values.items())
        raise PeftValueError(f"{found} are magnitudes and cannot be negative")


def check_pattern(name: str, pattern: str) -> None:
    """Check that a field holds a regular expression that compiles, and that can be matched in bounded time."""
    try:
        compiled(pattern)
    except PeftValueError as error:
        raise ValueError(f"{name}={error}") from error


def refuse_unknown_fields(cls: type, values: Iterable[str]) -> None:
    """Refuse a keyword that a config does not take."""
    parameters = inspect.signature(cls.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in values:
        if name not in parameters:
            bare = next((base for base in cls.__mro__ if name in inspect.get_annotations(base)), None)
            if bare is not None and name not in bare.__dict__.get("__dataclass_fields__", {}):
                raise TypeError(
                    f"{name!r} stands in {bare.__name__}, which derives from a config and is no dataclass, so that it "
                    f"is no field; put @dataclass in front of the class"
                )
            near = nearest(name, cls.__dataclass_fields__, most=1)
            raise TypeError(f"{cls.__name__} has no field {name!r}{did_you_mean(near)}")
