# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Clocks and memory, as the cases use them inside a worker."""

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Run something once, and give the CPU time that this process took for it."""
    return _seconds(action, time.process_time)


def wall_seconds(action: Callable[[], Any]) -> float:
    """Run something once, and give the time that went by."""
    return _seconds(action, time.perf_counter)


def _seconds(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    gc.collect()  # what happened before is not charged to the action
    start = clock()
    action()
    return clock() - start


def best_of(times: int, *actions: Callable[[], Any], calls: int = 1) -> list[float]:
    """
    Run several actions in turn, there and back, so that they share whatever noise there is.

    Args:
        times: how often each is timed.
        actions: what to run.
        calls: how often an action is called in one timing, for actions too short for the clock.

    Returns:
        For each action the least CPU time of one call, in seconds.
    """
    best = [float("inf")] * len(actions)
    order = list(enumerate(actions))
    for _ in range(times):
        for i, action in order:
            start = time.process_time()
            for _ in range(calls):
                action()
            best[i] = min(best[i], (time.process_time() - start) / calls)
        order.reverse()  # none always follows the same other one
    return best


class MemoryMeter:
    """
    Memory of this process beyond what it held when the meter was made, in bytes.

    It reads what the kernel says about physical memory, and needs Linux for that.

    Raises:
        OSError: where there is no such account.
    """

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # lets the high-water mark start anew
        self._start = _status("VmRSS")

    def peak(self) -> int:
        """The most that was held at any time."""
        return _status("VmHWM") - self._start

    def held(self) -> int:
        """What is held now."""
        gc.collect()
        return _status("VmRSS") - self._start


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE).group(1)) * 1024
