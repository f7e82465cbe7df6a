# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Folders of adapters that were changed at random: each loads, or is refused with a reason by a class of this package.

Nothing hangs, nothing is imported, started or written, and a base model that was refused an adapter is as it was.
"""

import copy
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.helpers import snapshot
from support.hostile_folders import BAIT, CHANGES, CONFIG, VALID, Folder, forward, make_valid, watched

from peft import PeftModel
from peft.cli import _run, inspect, verify
from peft.utils.error import PeftError


MUTANTS, WIDE_MUTANTS = 2_000, 20_000
# seconds; an adapter of a tiny model loads in milliseconds
PATIENCE = 30
COMMANDS = {"inspect": inspect, "verify": verify}

pytestmark = pytest.mark.filterwarnings("ignore")


class Hang(BaseException):
    """Reading a folder took much too long."""


def _ring(*_: object) -> None:
    raise Hang


@contextmanager
def impatiently() -> Iterator[None]:
    """Raise inside if it takes too long; end the process, with a trace, if even that cannot be done."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


class Ground:
    """
    Where mutants of one valid folder are tried.

    Args:
        name: which one.
        root: a folder for this alone.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.template, self.valid = make_valid(name, root / "valid")
        self.base = copy.deepcopy(self.template)
        self.before = snapshot(self.base)
        self.folder, self.outside = root / "adapter", root / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("secret")
        (root / f"{BAIT}.py").write_text("raise SystemExit('the bait was taken')")
        self.outcomes: Counter = Counter()

    def load(self, low_cpu_mem_usage: bool) -> None:
        """Load what is in the folder; if that is refused, check how."""
        try:
            model = PeftModel.from_pretrained(self.base, self.folder, low_cpu_mem_usage=low_cpu_mem_usage)
            forward(model)
        except PeftError as error:
            self.outcomes[type(error).__name__] += 1
            text = str(error)
            assert 20 < len(text) < 6_000, text[:1000]
            assert "Traceback" not in text
            assert snapshot(self.base) == self.before, "a refused adapter has changed the base model"
        else:
            self.outcomes["loaded"] += 1
            self.base = copy.deepcopy(self.template)
            self.before = snapshot(self.base)

    def ask(self, command: str) -> None:
        """Let the command line look at the folder."""
        arguments = Namespace(adapter=str(self.folder), base=None, tensors=True, json=True)
        status, result, notes = _run(COMMANDS[command], arguments)
        assert status in (0, 1, 2)
        plain = {name: value for name, value in result.items() if not name.startswith("_")}
        json.dumps([plain, notes]).encode()
        if "error" in result:
            assert 20 < len(result["error"]) < 6_000
        else:
            COMMANDS[command].as_text(result).encode()
        self.outcomes[f"{command}: {status}"] += 1


@pytest.fixture
def ground(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """A ground for the folder that the test is asked for."""
    monkeypatch.syspath_prepend(tmp_path)
    return Ground(request.param, tmp_path)


def mutate(folder: Folder, rng: random.Random) -> Folder:
    """Copy a folder and change it in one to three ways."""
    mutant = copy.deepcopy(folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if mutant.entries:
            rng.choice(CHANGES)(rng, mutant)
    return mutant


def try_mutants(ground: Ground, count: int) -> None:
    """Try that many mutants of a valid folder."""
    ground.valid.write(ground.folder, ground.outside)
    ground.load(False)
    ground.ask("inspect")
    ground.ask("verify")
    assert set(ground.outcomes) == {"loaded", "inspect: 0", "verify: 0"}

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64 - 1))
    def try_one(seed: int) -> None:
        rng = random.Random(seed)
        mutate(ground.valid, rng).write(ground.folder, ground.outside)
        with impatiently(), watched(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            ground.load(rng.random() < 0.2)
            ground.ask(rng.choice(("inspect", "verify")))

    try_one()
    tried = sum(count for outcome, count in ground.outcomes.items() if ":" not in outcome)
    assert tried >= count
    assert ground.outcomes["loaded"] < tried / 2 + 1, "most mutants are harmless"


@pytest.mark.parametrize("ground", VALID, indirect=True)
def test_mutants(ground: Ground) -> None:
    try_mutants(ground, MUTANTS // len(VALID) + 1)


@pytest.mark.wide
@pytest.mark.parametrize("ground", VALID, indirect=True)
def test_many_mutants(ground: Ground) -> None:
    try_mutants(ground, WIDE_MUTANTS // len(VALID) + 1)


# ------------------------------------------------------------------------------------------ sizes before memory
# Done in a process of its own, which may not have more memory than it needs to know what the package is.
_IN_A_SMALL_PROCESS = """
import json, resource, sys
import torch
import test_fuzz_adapter_folders
from support import hostile_folders
from peft import PeftModel
from peft.utils.error import PeftError

def used(name):  # in KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

for name, folder in json.loads(sys.argv[1]):
    base = hostile_folders.VALID[name][0]()
    resource.setrlimit(resource.RLIMIT_AS, ((used("VmSize") + 200 * 1024) * 1024, -1))
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    before = used("VmRSS")
    try:
        PeftModel.from_pretrained(base, folder)
        found = "loaded"
    except PeftError as error:
        found = str(error)
    print(json.dumps([found, used("VmHWM") - before]))
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""
HUGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "rank": ("lora", {"r": 20_000_000, "rank_pattern": {}}, "rank"),
    "rank of some": ("lora", {"rank_pattern": {"head": 20_000_000}}, "rank"),
    "rank with a magnitude": ("lora of layers", {"r": 20_000_000}, "rank"),
    "rank of AdaLoRA": ("adalora", {"init_r": 20_000_000}, "rank"),
    "rank of LoHa": ("loha", {"r": 20_000_000}, "rank"),
    "reflections": ("hra", {"r": 20_000_000}, "rank"),
    "rank of VeRA": ("vera", {"r": 20_000_000}, "rank"),
    "bank": ("vblora", {"num_vectors": 20_000_000}, "sizes"),
    "vectors": ("vblora", {"vector_length": 20_000_000}, "sizes"),
    "blocks": ("oft", {"oft_block_size": 20_000_000}, ""),
    "blocks of BOFT": ("boft", {"boft_block_size": 20_000_000}, ""),
    "virtual tokens": ("prompt", {"num_virtual_tokens": 20_000_000}, "sizes"),
    "width of tokens": ("prompt", {"token_dim": 20_000_000_000}, "sizes"),
    "tokens of a prefix": ("prefix", {"num_virtual_tokens": 20_000_000}, "sizes"),
    "layers of a prefix": ("prefix", {"num_layers": 20_000_000}, "sizes"),
    "tasks": ("multitask prompt", {"num_tasks": 20_000_000}, "sizes"),
    "token ids": ("tokens", {"token_indices": "10 million"}, "bytes"),
    "names": ("lora", {"target_modules": "10 million"}, "bytes"),
    "iterations": ("lora", {"init_lora_weights": "pissa_niter_20000000"}, "iterations"),
}


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    folders = []
    for number, (name, fields, _) in enumerate(HUGE.values()):
        path = tmp_path / str(number)
        make_valid(name, path / "valid")[1].write(path / "adapter", path)
        config = path / "adapter" / CONFIG
        text = json.dumps({**json.loads(config.read_text(encoding="utf-8")), **fields})
        text = text.replace('"10 million"', f"[{'1, ' * 10_000_000}1]")
        config.write_text(text, encoding="utf-8")
        folders.append((name, str(path / "adapter")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IN_A_SMALL_PROCESS, json.dumps(folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=10 * PATIENCE,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(HUGE), done.stderr[-3000:]
    for (name, (_, _, mention)), (found, kibibytes) in zip(HUGE.items(), lines, strict=True):
        assert found != "loaded" and mention in found, (name, found)
        assert kibibytes < 50 * 1024, (name, kibibytes)
