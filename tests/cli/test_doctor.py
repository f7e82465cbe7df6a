# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft doctor`: it finds what will go wrong, and nothing where nothing will."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import llama

import peft
from peft.cli import main


def doctor(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run it; give the status, and what was looked at by name."""
    status = main(["doctor", *arguments, "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return status, {check["what"]: check for check in checks}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of packages that are said to be installed instead of those that are."""
    said: dict[str, str] = {}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: said[name] if name in said else version(name))
    return said


def test_an_environment_in_which_nothing_is_wrong(
    capsys: pytest.CaptureFixture, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["peft"] = peft.__version__
    monkeypatch.setattr(importlib.metadata, "distributions", list)
    status, checks = doctor(capsys)
    assert status == 0 and all(check["problem"] is None for check in checks.values())
    assert checks["torch"]["found"] == torch.__version__.partition("\n")[0]
    assert checks["peft is imported from"]["found"] == str(Path(peft.__file__).parent)
    assert main(["doctor"]) == 0
    assert "nothing was found that will go wrong" in capsys.readouterr().out


def test_another_version_than_the_installed_one(capsys: pytest.CaptureFixture, installed: dict[str, str]) -> None:
    installed["peft"] = "0.21.2"
    status, checks = doctor(capsys)
    assert status == 1 and "another peft is installed" in checks["version"]["problem"]
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "!!" in out and "version: another peft" in out


def test_the_released_package(
    capsys: pytest.CaptureFixture, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["peft"] = "0.21.2"
    monkeypatch.setattr(peft, "__version__", "0.21.2")
    assert "not the fork" in doctor(capsys)[1]["version"]["problem"]


class Client:
    """A distribution that asks for something."""

    name, version = "trainer", "1.0"

    def __init__(self, *requires: str) -> None:
        self.requires = list(requires)


def test_caps_of_clients(
    capsys: pytest.CaptureFixture, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["peft"] = peft.__version__
    for asked, wrong in (("peft<=0.18.1", True), ("peft>=0.15", False), ("peft", False), ("torch<1", False)):
        monkeypatch.setattr(importlib.metadata, "distributions", lambda asked=asked: [Client(asked, "!?")])
        status, checks = doctor(capsys)
        assert status == int(wrong), asked
        assert ("trainer 1.0" in checks) == asked.startswith("peft")
        if wrong:
            assert "bring the released package back" in checks["trainer 1.0"]["problem"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Client('peft<0.1; extra == "train"')])
    assert doctor(capsys)[0] == 0, "an extra that was not asked for"


def test_a_package_that_is_missing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_accelerate(name: str) -> str:
        if name == "accelerate":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_accelerate)
    status, checks = doctor(capsys)
    assert status == 1 and "pip install accelerate" in checks["accelerate"]["problem"]


def test_settings_of_the_environment(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_ENSURE_WEIGHT_TYING", raising=False)
    monkeypatch.setenv("PEFT_DISABLE_FUSED", "1")
    assert doctor(capsys)[1]["settings"]["found"] == "PEFT_DISABLE_FUSED=1"


@pytest.mark.parametrize("same", [True, False])
def test_a_model_whose_files_and_config_contradict_each_other(
    same: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    llama(tied=True).save_pretrained(tmp_path)
    _, checks = doctor(capsys, str(tmp_path))
    assert checks["tied"]["found"] == "model.embed_tokens.weight = lm_head.weight"
    assert checks["tied"]["problem"] is None and checks["tie_word_embeddings"]["found"] == "True"

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(tensors, file, {"format": "pt"})
    status, checks = doctor(capsys, str(tmp_path))
    problem = checks["tied"]["problem"]
    assert (problem is None) == same
    if not same:
        assert status == 1 and "tie_word_embeddings to false" in problem


def test_a_config_alone_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    llama().config.save_pretrained(tmp_path)
    _, checks = doctor(capsys, str(tmp_path))
    assert checks["tied"] == {"what": "tied", "found": "nothing", "problem": None}
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert "there is no file" in capsys.readouterr().err
