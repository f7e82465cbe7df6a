# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The cache of a model with a small one beside it."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ...utils.error import PeftNotImplementedError


class ShadowCache(Cache):
    """
    The caches of the base model and of the small one as one.

    What changes batch or length goes to both, all else is answered by that of the base model.

    Args:
        base: cache of the base model; a new one if left out.
        shadow: cache of the small model; likewise.

    Example:

        >>> from peft.tuners.shadow import ShadowCache
        >>> ShadowCache().get_seq_length()
        0
    """

    def __init__(self, base: Cache | None = None, shadow: Cache | None = None) -> None:
        self.base = DynamicCache() if base is None else base
        self.shadow = DynamicCache() if shadow is None else shadow

    def __getattr__(self, name: str) -> Any:
        """Answer as the base model's cache does."""
        if name in ("base", "shadow") or name.startswith("__"):  # while unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Any:
        return iter(self.base)

    def __getitem__(self, layer_idx: int) -> Any:
        return self.base[layer_idx]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base={self.base!r}, shadow={self.shadow!r})"

    def reset(self) -> None:
        """Forget all tokens."""
        self.base.reset(), self.shadow.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put other samples into the places of the batch."""
        self.base.reorder_cache(beam_idx), self.shadow.reorder_cache(beam_idx)

    def crop(self, max_length: int) -> None:
        """Forget tokens at the end."""
        self.base.crop(max_length), self.shadow.crop(max_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        self.base.batch_repeat_interleave(repeats), self.shadow.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some samples."""
        self.base.batch_select_indices(indices), self.shadow.batch_select_indices(indices)

    def to_legacy_cache(self) -> Any:
        """
        Refuse: tuples have no room for two caches.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError("a ShadowCache holds two caches, which one tuple cannot; use it as it is")

    @classmethod
    def from_legacy_cache(cls, past_key_values: Any = None) -> "ShadowCache":
        """
        Refuse: tuples have no room for two caches.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError("a ShadowCache holds two caches, which one tuple cannot; use it as it is")


def _answered_by_base(name: str) -> Callable[..., Any]:
    def answer(self: ShadowCache, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base, name)(*args, **kwargs)

    answer.__name__ = name
    return answer


# what the class of all caches has would otherwise hide what that of the base model does
for _name, _value in vars(Cache).items():
    if not _name.startswith("__") and _name not in vars(ShadowCache):
        _is_property = isinstance(_value, property)
        _get = (lambda name: lambda self: getattr(self.base, name))(_name)
        setattr(ShadowCache, _name, property(_get) if _is_property else _answered_by_base(_name))
