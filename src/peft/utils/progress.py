# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A bar for work that takes longer than a moment, and whose steps are done elsewhere than it begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm


_BAR: ContextVar[tqdm | None] = ContextVar("progress", default=None)


@contextmanager
def showing_progress(description: str, steps: int) -> Iterator[None]:
    """
    Show a bar inside a context, once that takes longer than a moment, where somebody can see it.

    Args:
        description: what is being done.
        steps: how often `advance` is going to be called.
    """
    with tqdm(total=steps, desc=description, disable=None, delay=2, leave=False) as bar:
        token = _BAR.set(bar)
        try:
            yield
        finally:
            _BAR.reset(token)


def advance() -> None:
    """Note that a step is done; without a bar, nothing happens."""
    if (bar := _BAR.get()) is not None:
        bar.update()
