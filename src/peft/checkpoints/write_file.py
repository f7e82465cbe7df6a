# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Writing the tensors of a checkpoint to a file."""

import json
import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file

from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.files import write_atomically
from .aliases import aliases_to_header, split_aliases
from .hashes import hashes_to_header


def write_peft_weights(
    folder: str, tensors: Mapping[str, torch.Tensor], safe_serialization: bool, deduplicate_tied: bool
) -> None:
    """
    Write the tensors of a checkpoint; an older file is replaced when the new one is whole.

    Args:
        folder: an existing folder.
        tensors: key -> tensor.
        safe_serialization: write safetensors; False writes a pickle.
        deduplicate_tied: write a tensor that stands under several keys once.
    """
    if not safe_serialization:
        write_atomically(os.path.join(folder, WEIGHTS_NAME), lambda path: torch.save(tensors, path))
        return
    kept, aliases = split_aliases(tensors)
    header = {"format": "pt"}
    if deduplicate_tied:
        header.update(aliases_to_header(aliases))
    else:
        # the format has no notion of two names for one tensor
        kept.update((alias, place.read(kept[place.key]).detach().clone()) for alias, place in aliases.items())
    whole = {key: tensor.detach().contiguous() for key, tensor in kept.items()}
    header.update(hashes_to_header(whole))
    write_atomically(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), lambda path: _save_sorted(whole, path, header))


def _save_sorted(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
    """Write safetensors with the metadata in alphabetical order, so that equal adapters give equal files."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the order has no influence on the length; only another way of escaping could have
            file.seek(8)
            file.write(text.ljust(size))
