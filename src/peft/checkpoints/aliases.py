# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors of a checkpoint that stand under several keys: written once, with a table of aliases in the header."""

import json
from collections.abc import Hashable, Mapping

import torch

from ..utils.error import PeftValueError
from ..utils.same_tensor import identity_of
from .keys import Place


ALIASES_HEADER = "tied_aliases"

_BAD_ALIASES = (
    "the table of tied tensors in the file's header does not fit its content ({}); the file was changed after it was "
    "saved: save the adapter again"
)


def split_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Place]]:
    """
    Keep each tensor of a checkpoint once.

    Args:
        tensors: key -> tensor, the keys of owners before those of followers. Tensors are the same if they are the same
            memory, read forwards or transposed.

    Returns:
        The tensors to write, and a table alias -> place of its tensor among them.
    """
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, Place] = {}
    first: dict[Hashable, str] = {}
    for key, tensor in tensors.items():
        owner = first.get(identity_of(tensor))
        transposed_owner = first.get(identity_of(tensor.T)) if tensor.dim() == 2 else None
        if owner is None and transposed_owner is None:
            kept[key] = tensor
            first[identity_of(tensor)] = key
        else:
            aliases[key] = Place(transposed_owner, True) if owner is None else Place(owner)
    return kept, aliases


def aliases_to_header(aliases: Mapping[str, Place]) -> dict[str, str]:
    """Write a table of aliases as an entry of a safetensors header; nothing for an empty table."""
    return {ALIASES_HEADER: json.dumps(aliases, sort_keys=True)} if aliases else {}


def restore_aliases(tensors: dict[str, torch.Tensor], header: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """
    Give tensors that were written once all their keys again.

    Args:
        tensors: content of a safetensors file.
        header: its metadata.

    Raises:
        PeftValueError: if the table names a key that the file lacks.
    """
    places = aliases_from_header(header)
    absent = [place.key for place in places.values() if place.key not in tensors]
    if absent:
        raise PeftValueError(_BAD_ALIASES.format(f"there is no {absent[0]!r}"))
    twice = [alias for alias in places if alias in tensors]
    if twice:
        raise PeftValueError(_BAD_ALIASES.format(f"{twice[0]!r} is a tensor of its own"))
    return {**tensors, **{alias: place.read(tensors[place.key]) for alias, place in places.items()}}


def aliases_from_header(header: Mapping[str, str] | None) -> dict[str, Place]:
    """
    Read the table of aliases from the metadata of a safetensors file.

    Args:
        header: the metadata.

    Returns:
        Key that is not in the file -> the key, and the layout, that it stands for.

    Raises:
        PeftValueError: if it is no such table.
    """
    try:
        aliases = json.loads((header or {}).get(ALIASES_HEADER, "{}"))
        return {alias: Place(str(key), bool(transposed)) for alias, (key, transposed) in aliases.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise PeftValueError(_BAD_ALIASES.format(repr(error))) from error
