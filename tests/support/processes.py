# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Work that several processes do together, for the tests of distributed training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


WORLD = 2


def run_processes(worker: Callable[[int, str], None], folder: Path, limit: float) -> Path:
    """
    Run a worker in `WORLD` processes; whatever happens, none is left afterwards.

    Args:
        worker: is given its rank and the folder; what it has not written there when time is up is missing.
        folder: where results go.
        limit: seconds.
    """
    context = mp.start_processes(worker, (str(folder),), WORLD, join=False, start_method="spawn")
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1) and time.monotonic() < end:
            pass
    finally:
        for process in context.processes:
            process.kill()
    return folder


@contextmanager
def process_group(rank: int, folder: str, limit: float) -> Iterator[None]:
    """Let a worker meet the others, with one thread for each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=limit)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
