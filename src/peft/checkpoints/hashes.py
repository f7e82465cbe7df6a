# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Hashes of an adapter's tensors in the header of its file: whether it is still what was saved."""

import hashlib
import json
from collections.abc import Mapping

import torch


HASHES_HEADER = "sha256"


def hash_of(tensor: torch.Tensor) -> str:
    """
    Give the SHA-256 of a tensor's bytes, as they stand in a file.

    Args:
        tensor: any tensor that is not on the meta device.

    Example:

        >>> import torch
        >>> hash_of(torch.zeros(2))[:8]
        'af5570f5'
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(data.numpy())).hexdigest()


def hashes_to_header(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write the hashes of tensors as an entry of a safetensors header."""
    return {HASHES_HEADER: json.dumps({key: hash_of(tensor) for key, tensor in sorted(tensors.items())})}


def hashes_from_header(header: Mapping[str, str] | None) -> dict[str, str] | None:
    """
    Read the hashes from a safetensors header.

    Args:
        header: its free entries.

    Returns:
        Key -> hash; None if there are none, as in files of other programs.
    """
    try:
        hashes = json.loads((header or {}).get(HASHES_HEADER, "null"))
    except (ValueError, RecursionError):
        return None
    return hashes if isinstance(hashes, dict) else None
