# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PEFT_ENSURE_WEIGHT_TYING sets what the field `ensure_weight_tying` of new configs starts with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[2] / "src"


def run(code: str, said: str | None, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, whose environment says something, or nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "PEFT_ENSURE_WEIGHT_TYING"}
    environment["PYTHONPATH"] = str(SOURCE)
    if said is not None:
        environment["PEFT_ENSURE_WEIGHT_TYING"] = said
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


NEW = """
import inspect, json
from dataclasses import dataclass
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_config

@dataclass
class Clients(PeftConfig):
    target_modules: list[str] | None = None

print(json.dumps([
    LoraConfig().ensure_weight_tying,
    IA3Config().ensure_weight_tying,
    Clients().ensure_weight_tying,
    get_peft_config({"peft_type": "LORA"}).ensure_weight_tying,
    inspect.signature(LoraConfig).parameters["ensure_weight_tying"].default,
]))
print(*(LoraConfig(ensure_weight_tying=told).ensure_weight_tying for told in (False, True)))
"""


@pytest.mark.parametrize(
    ("said", "default"),
    [("1", True), (" True ", True), ("0", False), ("", False), (None, False), ("off", False), ("yes", True)],
)
def test_default_of_new_configs(said: str | None, default: bool) -> None:
    done = run(NEW, said)
    assert done.returncode == 0, done.stderr
    found, explicit = done.stdout.splitlines()
    assert json.loads(found) == [default] * 5 and explicit == "False True"
    assert [line for line in done.stderr.splitlines() if "PEFT_ENSURE_WEIGHT_TYING" in line] == (
        [f"PEFT_ENSURE_WEIGHT_TYING={said}: new configs have ensure_weight_tying=True, unless they are told otherwise"]
        if default
        else []
    )


FILES = """
import json, sys
from peft import LoraConfig, PeftConfig
folder = sys.argv[1]
LoraConfig().save_pretrained(folder + "/new")
LoraConfig(ensure_weight_tying=False).save_pretrained(folder + "/told")
print([PeftConfig.from_pretrained(f"{folder}/{name}").ensure_weight_tying for name in ("new", "told", "old")])
"""


def test_files_say_what_they_said(tmp_path: Path) -> None:
    """A file without the field is that of an adapter that was trained without it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    done = run(FILES, "1", str(tmp_path))
    assert done.stdout.strip() == "[True, False, False]", done.stderr
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["ensure_weight_tying"] is True


@pytest.mark.parametrize("said", ["2", "maybe", "None"])
def test_anything_else_is_refused(said: str) -> None:
    done = run("import peft; peft.LoraConfig()", said)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "PeftConfigError" in error and f"PEFT_ENSURE_WEIGHT_TYING is '{said}'" in error and "unset it" in error
