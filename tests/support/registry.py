# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The registries of methods and of LoRA's strategies, for tests that enter their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import registry
from peft.tuners.lora.starts import registry as starts
from peft.tuners.lora.variants import registry as variants


@contextmanager
def methods_put_back() -> Iterator[None]:
    """Forget afterwards what is registered inside."""
    registry.find_methods()
    with _put_back(registry._METHODS):
        yield


@contextmanager
def strategies_put_back() -> Iterator[None]:
    """Forget afterwards which starts and variants of LoRA are registered inside."""
    with _put_back(starts._STARTS), _put_back(variants._VARIANTS):
        yield


@contextmanager
def _put_back(table: dict[Any, Any]) -> Iterator[None]:
    before = dict(table)
    try:
        yield
    finally:
        table.clear()
        table.update(before)
