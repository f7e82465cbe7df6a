# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Turning fused layers off."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


# environment variable that turns fused layers off for a whole process
VARIABLE = "PEFT_DISABLE_FUSED"

# how many have turned them off
off: int = int(os.environ.get(VARIABLE, "").strip().lower() not in ("", "0", "false", "no", "off"))
_lock = threading.Lock()


@contextmanager
def disable_fused() -> Iterator[None]:
    """
    Compute all layers in the ordinary way: the base layer, and each adapter by modules and operations of its own.

    Outputs and gradients are the same but for rounding, so this is for comparing, for looking for errors, and for code
    that replaces operations of torch. It counts for all threads. The environment variable `PEFT_DISABLE_FUSED=1`,
    set before this package is imported, does it for a whole process.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, disable_fused, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> x = torch.randn(2, 4)
        >>> with disable_fused():
        ...     expected = model(x)
        >>> torch.allclose(model(x), expected)
        True
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    global off
    with _lock:
        off += step
