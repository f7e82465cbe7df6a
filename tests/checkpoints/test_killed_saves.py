# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Saves that are cut short, wherever: the folder holds the old adapter or the new one, whole, and never half of each.

The two differ in weights and in a field of the config that no tensor shows, so that a mixture would load and be wrong.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import assert_equal, features, files_below, logits, randomise, stack

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.files import read_json
from peft.utils.warning import PeftWarning


WEIGHTS, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
# whatever changes a file or a folder comes by as one of these, or as the opening of a file to write to it
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_at_event: list[Callable[[str, tuple], None]] = []


def _watch(event: str, found: tuple) -> None:
    if _at_event and (event in EVENTS or (event == "open" and (found[2] or 0) & WRITING)):
        _at_event[0](event, found)


sys.addaudithook(_watch)


def adapter(alpha: int) -> PeftModel:
    """An adapter of which everything follows from a number."""
    model = get_peft_model(stack(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["up", "head"])).eval()
    randomise(model, seed=alpha)
    return model


OLD, NEW = 3, 5


@pytest.fixture(scope="module")
def expected() -> dict[int, torch.Tensor]:
    """What the adapters compute."""
    return {alpha: logits(adapter(alpha), features()) for alpha in (OLD, NEW)}


def loaded(folder: Path, expected: dict[int, torch.Tensor]) -> int:
    """Load an adapter and say which one it is, after making sure that it is whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model = PeftModel.from_pretrained(stack(), folder)
    alpha = model.peft_config["default"].lora_alpha
    assert_equal(logits(model, features()), expected[alpha])
    return alpha


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; give the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(count: int) -> Callable[[str, tuple], None]:
    """Give a function that ends the process, as a power cut would, when it is called for the so-many-th time."""
    calls = itertools.count(1)
    return lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == count else None


FORMATS = [
    (True, True),
    pytest.param(True, False),
    pytest.param(False, True, marks=pytest.mark.wide),
    pytest.param(False, False, marks=pytest.mark.wide),
]


@pytest.mark.parametrize(("old_safe", "new_safe"), FORMATS)
def test_killed_at_every_file_operation(old_safe: bool, new_safe: bool, tmp_path: Path, expected: dict) -> None:
    old, new = adapter(OLD), adapter(NEW)
    old.save_pretrained(tmp_path / "old", safe_serialization=old_safe)
    found = []
    for count in itertools.count(1):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(count))

        def save(folder: Path = folder, count: int = count) -> None:
            _at_event.append(kill_at(count))
            new.save_pretrained(folder, safe_serialization=new_safe)

        killed = in_child(save) == signal.SIGKILL
        found.append(loaded(folder, expected))
        if not killed:
            break
        new.save_pretrained(folder, safe_serialization=new_safe)  # the next save puts everything right
        assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_alpha"] == NEW
        assert not [name for name in os.listdir(folder) if re.fullmatch(r"\.adapter_config\.\w{64}\.json", name)]
    assert len(found) > 10 and found == sorted(found) and set(found) == {OLD, NEW}


@pytest.mark.parametrize("new_safe", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_an_error_at_every_file_operation(new_safe: bool, tmp_path: Path, expected: dict) -> None:
    old, new = adapter(OLD), adapter(NEW)
    old.save_pretrained(tmp_path / "old")
    found = []
    for count in itertools.count(1):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(count))
        before, calls = set(files_below(folder)), itertools.count(1)

        def fail(*_: object, calls: Iterator[int] = calls, count: int = count) -> None:
            if next(calls) == count:
                raise OSError(28, "No space left on device")

        _at_event.append(fail)
        try:
            with contextlib.suppress(OSError):
                new.save_pretrained(folder, safe_serialization=new_safe)
        finally:
            _at_event.clear()
        found.append(loaded(folder, expected))
        if next(calls) <= count:
            break
        assert len(set(files_below(folder)) - before) <= 3, "what was being written is cleared away"
    assert len(found) > 10 and set(found) == {OLD, NEW}


def test_killed_at_any_time(tmp_path: Path, expected: dict) -> None:
    """Not only between operations, and one save after the other."""
    models = {alpha: adapter(alpha) for alpha in (OLD, NEW)}
    models[OLD].save_pretrained(tmp_path)
    for round_ in range(10):
        child = os.fork()
        if child == 0:
            for alpha in itertools.cycle((NEW, OLD)):
                models[alpha].save_pretrained(tmp_path)
        time.sleep(0.02 + 0.0053 * round_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded(tmp_path, expected)


def test_a_first_save_that_is_killed(tmp_path: Path, expected: dict) -> None:
    """There is no adapter yet, or the whole one."""
    new = adapter(NEW)
    outcomes = []
    for count in itertools.count(1):
        folder = tmp_path / str(count)
        folder.mkdir()

        def save(folder: Path = folder, count: int = count) -> None:
            _at_event.append(kill_at(count))
            new.save_pretrained(folder)

        killed = in_child(save) == signal.SIGKILL
        try:
            outcomes.append(loaded(folder, expected))
        except ValueError as error:
            assert "adapter_" in str(error)
            outcomes.append(0)
        if not killed:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, NEW}


def test_somebody_reads_while_somebody_saves(tmp_path: Path, expected: dict) -> None:
    models = {alpha: adapter(alpha) for alpha in (OLD, NEW)}
    models[OLD].save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        for alpha in itertools.cycle((NEW, OLD)):
            models[alpha].save_pretrained(tmp_path)
            time.sleep(0.003)
    try:
        found = [loaded(tmp_path, expected) for _ in range(60)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert set(found) == {OLD, NEW}


def save_all_but_the_last_move(model: PeftModel, folder: Path) -> None:
    """Save an adapter in a process that ends when its config still waits for its place."""

    def kill_before_the_last_move(event: str, found: tuple) -> None:
        if event == "os.rename" and os.fspath(found[1]) == str(folder / CONFIG):
            os.kill(os.getpid(), signal.SIGKILL)

    def save() -> None:
        _at_event.append(kill_before_the_last_move)
        model.save_pretrained(folder)

    assert in_child(save) == signal.SIGKILL


def test_a_save_ends_between_finding_its_config_and_reading_it(
    tmp_path: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(OLD).save_pretrained(tmp_path)
    save_all_but_the_last_move(adapter(NEW), tmp_path)
    (waiting,) = tmp_path.glob(".adapter_config.*")

    def read_after_the_last_move(path: str, **options: object) -> dict:
        if waiting.exists():
            waiting.rename(tmp_path / CONFIG)
        return read_json(path, **options)

    monkeypatch.setattr("peft.config.read_json", read_after_the_last_move)
    with pytest.warns(PeftWarning, match="cut short"):
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == NEW
    assert not waiting.exists() and loaded(tmp_path, expected) == NEW


def test_a_config_that_waits_is_told_of(tmp_path: Path, expected: dict) -> None:
    adapter(OLD).save_pretrained(tmp_path)
    save_all_but_the_last_move(adapter(NEW), tmp_path)
    with pytest.warns(PeftWarning, match="cut short.*rename it to adapter_config.json"):
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == NEW
    assert loaded(tmp_path, expected) == NEW
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes() + b" ")  # of other weights it says nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == OLD


def test_files_that_are_links_are_replaced_and_not_followed(tmp_path: Path, expected: dict) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    outside.mkdir()
    adapter(OLD).save_pretrained(folder)
    for name in (CONFIG, WEIGHTS, "README.md"):
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)
    assert loaded(folder, expected) == OLD
    before = files_below(outside)
    adapter(NEW).save_pretrained(folder)
    assert files_below(outside) == before
    assert loaded(folder, expected) == NEW and not (folder / CONFIG).is_symlink()
