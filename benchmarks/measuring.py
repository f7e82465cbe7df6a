# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Clocks and memory, as the cases use them inside a worker."""

import gc
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def busy_seconds() -> float:
    """
    Read the clock that charges a process for its own work alone.

    That is its CPU time, which others on the machine do not disturb; with an accelerator as the default device, the
    time that goes by until that has finished.
    """
    if torch.get_default_device().type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Run something once, and give the time that `busy_seconds` counts for it."""
    return _seconds(action, busy_seconds)


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
        For each action the least time of one call, in seconds.
    """
    best = [float("inf")] * len(actions)
    order = list(enumerate(actions))
    for _ in range(times):
        for i, action in order:
            start = busy_seconds()
            for _ in range(calls):
                action()
            best[i] = min(best[i], (busy_seconds() - start) / calls)
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


class TensorMeter(TorchDispatchMode):
    """
    The most bytes of tensors that were alive at a time, among those that are made inside.

    Unlike what the kernel says, it is the same on every run.

    Attributes:
        peak: that number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count what it has made."""
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in self._stored((args, kwargs))}
        for tensor in self._stored(result):
            self._count(tensor, given)
        return result

    @staticmethod
    def _stored(values: Any) -> list[torch.Tensor]:
        """Give the tensors that have a storage of their own, as sparse ones have not."""
        return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.layout == torch.strided]

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in given or key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size
