# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The registry of methods, for tests that enter their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import registry


@contextmanager
def methods_put_back() -> Iterator[None]:
    """Forget afterwards what is registered inside."""
    registry.find_methods()
    before = dict(registry._METHODS)
    try:
        yield
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)
