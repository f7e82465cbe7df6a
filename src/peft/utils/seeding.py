# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Random numbers that are the same each time, without a change to those that the caller draws."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """
    Seed torch's generators inside a context, and leave them as they were before.

    Args:
        seed: the seed; None to do nothing.
        device: where numbers are drawn, beside the CPU.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
