# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Containers of tensors that layers of a model share: one module that stands on the tuner and on each layer."""

from collections.abc import Iterator

from torch import nn

from .buffer_dict import BufferDict


class SeenOnce:
    """
    A module that stands in several places, and that a walk meets in the first of them only, whatever it asks for.

    `torch.func.functional_call` takes each place for a tie of its own, puts the caller's tensor there once per place,
    and leaves it there in the end. State dicts go another way: they have a key for each place.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the module and those inside, unless the walk has met it; see `torch.nn.Module.named_modules`."""
        return super().named_modules(memo, prefix)


class SharedParameters(SeenOnce, nn.ParameterDict):
    """Parameters by adapter name."""


class SharedBuffers(SeenOnce, BufferDict):
    """Buffers by adapter name."""


class SharedGroups(SeenOnce, nn.ModuleDict):
    """By adapter name, the tensors that groups of layers share: `SharedParameters` or `SharedBuffers` by group."""
