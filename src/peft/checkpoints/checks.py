# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is asked of the tensors of a checkpoint before they are used or written."""

from collections.abc import Mapping

import torch

from ..utils.error import PeftRuntimeError
from .keys import Place


def refuse_without_storage(tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Refuse to save tensors that hold nothing.

    Raises:
        PeftRuntimeError: if one is on the meta device.
    """
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise PeftRuntimeError(
            f"{len(empty)} tensors are on the meta device and have no content, the first is {empty[0]!r}; an adapter "
            "that was made with low_cpu_mem_usage=True has to be loaded before it can be saved"
        )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """List the keys of tensors with entries that are infinite or no numbers."""
    return tuple(
        key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()
    )


def mistyped(
    found: Mapping[str, torch.Tensor], keys: Mapping[str, Place], live: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, str]]:
    """
    List the tensors of which only one, that of the checkpoint or that of the model, is for real numbers.

    Whole numbers that a checkpoint has as real ones do no harm.
    """
    types = {saved: (value.dtype, live[keys[saved].key].dtype) for saved, value in found.items()}
    return {
        saved: tuple(str(dtype).removeprefix("torch.") for dtype in pair)
        for saved, pair in types.items()
        if pair[0].is_floating_point != pair[1].is_floating_point
        and not (pair[0].is_floating_point and torch.equal(found[saved], found[saved].trunc()))
    }


def shape_of(place: Place, live: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Give the shape that a tensor of the model has in a checkpoint."""
    return tuple(place.read(live[place.key]).shape)
