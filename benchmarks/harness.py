# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Runs cases: one worker per package, measured in turn, round by round."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from case import OURS, Case


WORKER = Path(__file__).with_name("worker.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONHASHSEED": "0"}


class WorkerError(RuntimeError):
    """A worker could not measure what it was asked for."""


class Worker:
    """
    A process that has one of the two packages.

    Args:
        package: `OURS` or `RELEASED`.
        python: interpreter of the environment that has it.
    """

    def __init__(self, package: str, python: Path) -> None:
        environment = {**os.environ, **ONE_THREAD, **QUIET}
        if package != OURS:  # else it would import the package under development from there
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [python, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.versions: dict[str, str] = self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:] or ["it wrote nothing"]
            raise WorkerError(f"the worker ended (exit status {self._process.wait()}): {last[0]}")
        return json.loads(line)

    def _ask(self, **request: str) -> dict[str, Any]:
        print(json.dumps(request), file=self._process.stdin)
        return self._read()

    def measure(self, case_name: str) -> dict[str, float]:
        """
        Measure one round of a case.

        Raises:
            WorkerError: if the case raised, or the worker ended.
        """
        reply = self._ask(measure=case_name)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["figures"]

    def close_case(self, case_name: str) -> None:
        """Let go of what a case holds."""
        self._ask(close=case_name)

    def stop(self) -> None:
        """End the process, which ends by itself when its input does."""
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


@dataclass
class Samples:
    """
    What was measured for a case.

    Attributes:
        figures: package -> figure -> one value per round.
        errors: package -> why there is nothing, or less than was asked for.
    """

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, package: str, figures: Mapping[str, float]) -> None:
        """Add the figures of one round."""
        for name, value in figures.items():
            self.figures.setdefault(package, {}).setdefault(name, []).append(value)


class Workers:
    """
    The workers of a run, one per package; they are started when first needed and live on from case to case.

    Args:
        pythons: package -> interpreter.
    """

    def __init__(self, pythons: Mapping[str, Path]) -> None:
        self._pythons = pythons
        self._alive: dict[str, Worker] = {}

    def of(self, package: str) -> Worker:
        """Give the worker of a package."""
        if package not in self._alive:
            self._alive[package] = Worker(package, self._pythons[package])
        return self._alive[package]

    def discard(self, package: str) -> None:
        """End the worker of a package, if there is one; the next one starts afresh."""
        worker = self._alive.pop(package, None)
        if worker is not None:
            worker.stop()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for package in list(self._alive):
            self.discard(package)


def run_case(case: Case, workers: Workers, rounds: int, progress: Callable[[str], None]) -> Samples:
    """
    Measure a case: A B A B ..., so that both packages meet the same noise.

    Args:
        case: the case.
        workers: the workers of the run.
        rounds: how often each package is measured.
        progress: is told what is done.
    """
    samples = Samples()
    start = time.perf_counter()
    for number in range(1, rounds + 1):
        for package in case.packages:
            if package in samples.errors:
                continue
            progress(f"{case.name}: {package}, round {number} of {rounds}")
            if case.fresh_process:
                workers.discard(package)
            try:
                samples.add(package, workers.of(package).measure(case.name))
            except WorkerError as error:
                samples.errors[package] = str(error)
                workers.discard(package)
    for package in case.packages:
        if case.fresh_process or package in samples.errors:
            workers.discard(package)
        else:
            workers.of(package).close_case(case.name)
    progress(f"{case.name}: {time.perf_counter() - start:.0f} s")
    return samples


def run_cases(
    cases: Sequence[Case],
    workers: Workers,
    rounds: int | None = None,
    progress: Callable[[str], None] = lambda message: print(message, file=sys.stderr, flush=True),
) -> dict[str, Samples]:
    """
    Measure cases one after the other.

    Args:
        cases: what to measure.
        workers: the workers of the run.
        rounds: how often; each case's own number if left out.
        progress: is told what is done.

    Returns:
        Name of the case -> what was measured.
    """
    return {case.name: run_case(case, workers, rounds or case.rounds, progress) for case in cases}
