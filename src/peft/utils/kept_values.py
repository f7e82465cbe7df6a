# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that were computed from others, and are kept for as long as those stay as they are."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class KeptValue:
    """
    Something that was computed from tensors and numbers, for as long as they stay as they are.

    A tensor counts as changed if its storage is another one or was written to, but for writes through `.data`, which
    torch does not count. The storages are not kept alive, and nothing is kept of tensors that count no changes.

    Args:
        value: no inference tensor, so that autograd can keep it too.
        tensors: what it was computed from.
        numbers: numbers that it was computed from.
    """

    def __init__(self, value: torch.Tensor, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]):
        self._value, self._numbers = value, numbers
        self._seen = [(StorageWeakRef(t.untyped_storage()), t._version) for t in tensors]

    def get(self, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]) -> torch.Tensor | None:
        """Give the value, or None if a tensor or a number has changed."""
        for (storage, version), tensor in zip(self._seen, tensors, strict=True):
            if version != tensor._version or storage.cdata != tensor.untyped_storage()._cdata:
                return None
        return self._value if numbers == self._numbers else None

    @staticmethod
    def is_possible(tensors: tuple[torch.Tensor, ...]) -> bool:
        """Say whether something can be kept at all: changes of the tensors are counted."""
        if torch.compiler.is_compiling():
            return False
        try:
            return not any(t.is_inference() or t.is_meta or t.untyped_storage() is None for t in tensors)
        except NotImplementedError:  # tensors inside of `torch.func.vmap` and the like have no storage
            return False
