# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config files: where they are, how they are read, and whether what they say can be a config."""

import dataclasses
import os
import reprlib
import typing
from enum import Enum
from types import UnionType
from typing import Any

from ..utils.constants import CONFIG_NAME
from ..utils.error import PeftPathError, PeftTypeError
from ..utils.files import config_path
from ..utils.warning import warn


# what finding a file on the hub takes beside its name
HUB_KWARGS = {"cache_dir", "force_download", "local_files_only", "repo_type", "revision", "token", "etag_timeout"}


def find_config_file(name_or_path: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
    folder = os.path.join(name_or_path, subfolder) if subfolder else name_or_path
    path, waiting = config_path(folder)
    if waiting:
        warn(
            f"saving into {folder!r} was cut short after the weights were replaced; {path!r} is the config that "
            f"belongs to them and is used. Save again, or rename it to {CONFIG_NAME}"
        )
    if path is not None:
        return path
    refuse_local(name_or_path, folder, CONFIG_NAME)
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
    except Exception as error:  # the hub's client has dozens of classes for 'cannot be had'
        raise PeftPathError(
            f"no {CONFIG_NAME} at {name_or_path!r}: it is no local folder, and the hub answered: {error}"
        ) from error


def refuse_local(name_or_path: str, folder: str, wanted: str) -> None:
    """
    Refuse a path that exists here, but lacks a file of an adapter.

    Args:
        name_or_path: what the user gave: a path, or a hub id.
        folder: the folder that is meant.
        wanted: name of the file.

    Raises:
        PeftPathError: if there is such a path.
    """
    if os.path.isfile(name_or_path):
        raise PeftPathError(f"{name_or_path!r} is a file; give the folder that it is in")
    if not os.path.isdir(name_or_path):
        return
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    inner = [name for name in names if os.path.isfile(os.path.join(folder, name, wanted))]
    hint = "save_pretrained writes one"
    if inner:
        hint = f"there is one in its subfolder {inner[0]!r}: give that folder, or subfolder={inner[0]!r}"
    found = names[:10] if os.path.isdir(folder) else "no such folder"
    raise PeftPathError(f"no {wanted} in {folder!r} (found: {found}); {hint}")


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Take the fields of a JSON object, each of which may stand there once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in values if names.count(name) > 1)!r} stands there twice")
    return values


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a config can have")


def check_fields_of_file(config_cls: type, values: dict[str, Any]) -> None:
    """Check that what a file says has the types that the fields are declared with."""
    for f in dataclasses.fields(config_cls):
        value = values.get(f.name, f.default)
        # classes of users may have annotations that are texts
        if value is f.default or isinstance(f.type, str):
            continue
        if not _fits(value, float if "alpha" in f.name and f.type is int else f.type):
            names = getattr(f.type, "__name__", None) or str(f.type).replace("typing.", "")
            raise TypeError(f"{f.name} must be {names}, found {reprlib.repr(value)}")
    options = values.get("tokenizer_kwargs")
    if isinstance(options, dict) and options.get("trust_remote_code"):
        raise ValueError(
            "tokenizer_kwargs asks for trust_remote_code, which would run code of somebody else; if you trust it, set "
            "tokenizer_kwargs in Python"
        )


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value that was read from JSON can be one of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:  # which of them it is, the config checks itself
        return isinstance(value, type(arguments[0]))
    if origin in (list, tuple, set):
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, arguments[1]) for entry in value.values())
    if dataclasses.is_dataclass(hint):
        types = {f.name: f.type for f in dataclasses.fields(hint)}
        return isinstance(value, dict) and all(
            entry is None or _fits(entry, types[name]) for name, entry in value.items() if name in types
        )
    if hint is int or hint is float:
        numbers = int if hint is int else (int, float)
        # what goes beyond is no size, and no factor either
        return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is bool and value is None:  # no switch that is on
        return True
    return isinstance(value, str if issubclass(hint, Enum) else hint) if isinstance(hint, type) else True


def to_json(value: Any) -> Any:
    """Write sets as sorted lists (the same file on each run), enum members as their value, and types of tensors."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if str(value).startswith("torch.") and type(value).__name__ == "dtype":  # nothing here imports torch
        return str(value)
    raise PeftTypeError(f"a {type(value).__name__} cannot be written to {CONFIG_NAME}: {value!r}")


def write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
