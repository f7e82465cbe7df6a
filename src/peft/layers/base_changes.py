# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Changes that starting an adapter makes to base weights: put off until nothing can be refused any more."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


_PENDING: ContextVar[dict[Hashable, Callable[[], None]] | None] = ContextVar("pending_base_changes", default=None)


@contextmanager
def deferring_base_changes() -> Iterator[None]:
    """Put off what `change_base` is given until the end of the outermost such context; an exception drops it."""
    outer = _PENDING.get()
    pending: dict[Hashable, Callable[[], None]] = {}
    token = _PENDING.set(pending)
    try:
        yield
    finally:
        _PENDING.reset(token)
    if outer is not None:
        outer.update(pending)
        return
    for change in pending.values():
        change()


def change_base(key: Hashable, change: Callable[[], None]) -> None:
    """
    Change a base weight, now or at the end of the context that puts it off.

    Args:
        key: what is changed; a change that is waiting under the same key is replaced.
        change: does it, in place, and cannot fail.
    """
    pending = _PENDING.get()
    if pending is None:
        change()
    else:
        pending[key] = change
