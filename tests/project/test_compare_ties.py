# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The table that compares packages: all passes here, and what breaks a tie is seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft import LoraConfig, compare_ties


def test_everything_passes_here_and_a_copy_of_the_file_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert compare_ties.main(["--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert set(result["counts"]) == {title for title, _, _ in compare_ties.ROWS}
    assert all(passed == tried >= 7 for sides in result["counts"].values() for passed, tried in sides.values())
    table = compare_ties.as_table([result, result]).splitlines()
    assert len(table) == len(compare_ties.ROWS) + 2 and table[2].count("8 of 8") == 4

    alone = Path(shutil.copy(compare_ties.__file__, tmp_path / "alone.py"))
    source = "import alone; print([case.name for case in alone.cases()])"
    printed = subprocess.run(
        [sys.executable, "-c", source], cwd=alone.parent, capture_output=True, text=True, check=True
    )
    assert "Llama" in printed.stdout


def test_a_package_that_does_not_tie(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    first = compare_ties.cases()[:1]
    monkeypatch.setattr(compare_ties, "cases", lambda: first)
    tying = LoraConfig.__init__
    monkeypatch.setattr(
        LoraConfig, "__init__", lambda self, *args, **kw: tying(self, *args, **{**kw, "ensure_weight_tying": False})
    )
    assert compare_ties.main([]) == 1
    lines = {line[:48].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "0 of 1" in lines["saved: merged, one parameter, equal logits"]
    assert "1 of 1" in lines["saved: unload() gives the base model"]


def test_an_interpreter_that_is_none(capsys: pytest.CaptureFixture) -> None:
    assert compare_ties.main(["--python", shutil.which("true") or "/bin/true"]) == 2
    assert "has printed no result" in capsys.readouterr().err
