# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The package as it is built and imported, and the scripts and the example around it."""

import ast
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version
from safetensors import safe_open
from support.scripts import load_script

import peft


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tied_embeddings"
VERSION = "0.22.0+tied.1"


def run(*command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command and return what it printed; the output is part of the failure if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in conftest.py: one thread is enough for tiny models
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


class TestLazyImport:
    def modules_after(self, code: str) -> set[str]:
        """Top-level modules that a fresh interpreter holds after `code`."""
        report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
        return set(json.loads(run(sys.executable, "-c", f"{code}\n{report}").stdout))

    def test_the_package_loads_neither_torch_nor_transformers(self):
        loaded = self.modules_after("import peft")
        assert "peft" in loaded
        assert not loaded & {"torch", "transformers", "accelerate", "safetensors"}

    @pytest.mark.parametrize("name", ["LoraConfig", "PeftConfig", "PeftType", "TaskType"])
    def test_a_config_loads_no_torch(self, name):
        assert "torch" not in self.modules_after(f"from peft import {name}")

    def test_making_and_saving_a_config_loads_no_torch(self, tmp_path):
        code = f"from peft import LoraConfig\nLoraConfig(r=4, target_modules=['q']).save_pretrained({str(tmp_path)!r})"
        assert "torch" not in self.modules_after(code)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4

    def test_submodules_resolve_after_a_bare_import(self):
        code = "import peft; print(peft.tuners.lora.layer.Linear.__name__)"
        assert run(sys.executable, "-c", code).stdout == "Linear\n"

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = peft.no_such_name

    @pytest.mark.parametrize("name", peft.__all__)
    def test_every_public_name_resolves(self, name):
        assert getattr(peft, name) is not None
        assert name in dir(peft)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_threads_that_wait_do_not_spin(monkeypatch):
    """With one other busy process, a step takes ten times as long if the threads of OpenMP spin while they wait."""
    show = ("make", "--file", ROOT / "Makefile", "--eval", "show: ; @echo policy: $$OMP_WAIT_POLICY", "show")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "policy: PASSIVE" in run(*show).stdout
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "policy: ACTIVE" in run(*show).stdout


class TestDistribution:
    def test_version(self):
        assert peft.__version__ == VERSION

    def test_the_installed_version_is_that_of_the_code(self):
        try:
            installed = metadata.distribution("peft")
        except metadata.PackageNotFoundError:
            pytest.skip("the package is on the path but not installed; `make test` installs it")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("url", ROOT.as_uri()) != ROOT.as_uri():
            pytest.skip(f"the installed package is another one, from {origin['url']}")
        assert installed.version == VERSION, "`make test` installs the package anew"

    @pytest.mark.parametrize("module", ["diffusers.utils.constants", "transformers.integrations.peft"])
    def test_the_version_is_one_that_clients_accept(self, module):
        pytest.importorskip(module.partition(".")[0])
        assert Version(VERSION) >= Version(importlib.import_module(module).MIN_PEFT_VERSION)

    def test_the_package_says_that_it_is_typed(self):
        assert (Path(peft.__file__).parent / "py.typed").is_file()

    def test_the_wheel_holds_every_file_of_the_package(self, tmp_path):
        pytest.importorskip("setuptools", "70.1", reason="building a wheel needs setuptools, which the test extra has")
        for name in ("setup.py", "pyproject.toml", "LICENSE"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(
            ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        )
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path)

        [wheel] = tmp_path.glob("*.whl")
        assert wheel.name == f"peft-{VERSION}-py3-none-any.whl"
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        source = tmp_path / "src"
        assert packed == {path.relative_to(source).as_posix() for path in source.glob("peft/**/*") if path.is_file()}
        assert "peft/py.typed" in packed

    def test_every_requirement_is_pinned(self, monkeypatch):
        setuptools = pytest.importorskip("setuptools", reason="setup.py needs setuptools, which the test extra has")
        arguments = {}
        monkeypatch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path(str(ROOT / "setup.py"))
        required = sum(arguments["extras_require"].values(), arguments["install_requires"])
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = {line.partition("==")[0] for line in pins if not line.startswith("#")}
        assert {re.match(r"[\w-]+", name)[0] for name in required} <= pinned

    def test_every_pin_is_exact(self):
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins
        assert [pin for pin in pins if not re.fullmatch(r'[\w-]+==[\w.]+(; python_version \S+ "3\.11")?', pin)] == []


class TestDocstringCheck:
    @pytest.fixture
    def script(self):
        return load_script(ROOT / "scripts" / "check_docstrings.py")

    def check(self, script: ModuleType, code: str) -> list[str]:
        """What the check finds in a module that consists of `code`."""
        module = ModuleType("made_up")
        exec(code, vars(module))
        module.__all__ = [name for name in vars(module) if not name.startswith("_") and name != "dataclass"]
        return list(script.missing_docstrings(module))

    def test_finds_functions_classes_methods_and_properties(self, script):
        code = """
def bare(): pass
def good(): "Documented."
class Bare:
    def method(self): pass
class Good:
    "Documented."
    @property
    def prop(self): pass
    @classmethod
    def make(cls): pass
    def _private(self): pass
    def method(self): "Documented."
"""
        assert self.check(script, code) == [
            "made_up.Bare",
            "made_up.Bare.method",
            "made_up.Good.prop",
            "made_up.Good.make",
            "made_up.bare",
        ]

    def test_a_class_docstring_is_neither_made_up_nor_inherited(self, script):
        code = """
from dataclasses import dataclass
@dataclass
class Data:
    x: int = 0
class Parent:
    "Documented."
class Child(Parent): pass
"""
        assert self.check(script, code) == ["made_up.Child", "made_up.Data"]

    def test_overrides_and_data_pass(self, script):
        code = """
class Parent:
    "Documented."
    def method(self): "Documented."
class Child(Parent):
    "Documented."
    def method(self): pass
TABLE = {}
"""
        assert self.check(script, code) == []


class TestPatches:
    SUBJECTS = ["[tying 1/3] Add the field", "Something else", "[tying 2/3] Find groups", "[tying 3/3] Tie"]

    @pytest.fixture
    def repository(self, tmp_path):
        folder = tmp_path / "repository"
        folder.mkdir()
        run("git", "init", "--quiet", "--initial-branch=main", cwd=folder)
        run("git", "config", "user.name", "A Person", cwd=folder)
        run("git", "config", "user.email", "person@example.org", cwd=folder)
        run("git", "config", "commit.gpgsign", "false", cwd=folder)
        self.commit(folder, "Base")
        return folder

    def commit(self, folder: Path, *subjects: str) -> None:
        """Commits that add a file each, named by the subject."""
        for subject in subjects:
            (folder / re.sub(r"\W+", "_", subject)).write_text(f"{subject}\n", encoding="utf-8")
            run("git", "add", ".", cwd=folder)
            run("git", "commit", "--quiet", "-m", subject, "-m", "Why it is done.", cwd=folder)

    def make_patches(self, folder: Path, check: bool = True) -> subprocess.CompletedProcess:
        return run(sys.executable, ROOT / "scripts" / "make_patches.py", cwd=folder, check=check)

    def test_writes_exactly_the_series(self, repository):
        self.commit(repository, *self.SUBJECTS)
        result = self.make_patches(repository)
        files = sorted((repository / "dist" / "patches").iterdir())
        assert result.stdout.splitlines() == [str(file) for file in files]
        assert [file.name for file in files] == [
            "0000-cover-letter.patch",
            "0001-tying-1-3-Add-the-field.patch",
            "0002-tying-2-3-Find-groups.patch",
            "0003-tying-3-3-Tie.patch",
        ]
        assert "Subject: [tying 2/3] Find groups\n\nWhy it is done.\n" in files[2].read_text(encoding="utf-8")

    def test_the_patches_apply_to_the_base(self, repository):
        self.commit(repository, *self.SUBJECTS)
        self.make_patches(repository)
        series = sorted((repository / "dist" / "patches").glob("*-tying-*.patch"))
        run("git", "checkout", "--quiet", "-b", "review", "main~4", cwd=repository)
        run("git", "am", "--quiet", "--keep", *series, cwd=repository)
        subjects = run("git", "log", "--reverse", "--format=%s", cwd=repository).stdout.splitlines()
        assert subjects == ["Base", *(subject for subject in self.SUBJECTS if subject.startswith("["))]
        others = run("git", "diff", "--name-only", "review", "main", cwd=repository).stdout
        assert others == "Something_else\n"

    def test_the_cover_letter_is_a_mail_with_the_sections_of_a_review(self, repository):
        self.commit(repository, *self.SUBJECTS)
        self.make_patches(repository)
        letter = (repository / "dist" / "patches" / "0000-cover-letter.patch").read_text(encoding="utf-8")
        head, _, body = letter.partition("\n\n")
        assert re.match(r"From [0-9a-f]{40} Mon Sep 17 00:00:00 2001\nFrom: A Person <person@example.org>\n", head)
        assert "\nSubject: [tying 0/3] Keep tied weights tied" in head
        for section in ("Problem", "Approach", "Out of scope", "Tests run"):
            assert f"{section}\n-" in body
        assert "  [tying 1/3] Add the field\n  [tying 2/3] Find groups\n  [tying 3/3] Tie\n" in body
        assert "Something else" not in body
        assert "_tying_3_3_Tie | 1 +" in body

    def test_a_second_run_replaces_the_first(self, repository):
        self.commit(repository, *self.SUBJECTS)
        self.make_patches(repository)
        stale = repository / "dist" / "patches" / "0009-tying-9-9-stale.patch"
        stale.write_text("stale", encoding="utf-8")
        self.make_patches(repository)
        assert not stale.exists()

    @pytest.mark.parametrize(
        "subjects, reason",
        [
            (["Something else", "About the [tying 1/1] series"], "no commit in the history of HEAD"),
            (["[tying 1/3] One", "[tying 3/3] Three"], "found 1/3, 3/3"),
            (["[tying 1/3] One", "[tying 2/3] Two"], "found 1/3, 2/3"),
            (["[tying 2/2] Two", "[tying 1/2] One"], "found 2/2, 1/2"),
            (["[tying 1/1] One", "[tying 1/1] Again"], "found 1/1, 1/1"),
        ],
        ids=["none", "gap", "unfinished", "wrong order", "twice"],
    )
    def test_no_series_is_an_error_and_writes_nothing(self, repository, subjects, reason):
        self.commit(repository, *subjects)
        result = self.make_patches(repository, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("make_patches: ") and reason in result.stderr
        assert not (repository / "dist").exists()

    def test_outside_a_repository_is_an_error(self, tmp_path):
        result = self.make_patches(tmp_path, check=False)
        assert result.returncode == 1
        assert "not a git repository" in result.stderr


class TestExample:
    @pytest.fixture
    def finetune(self, monkeypatch):
        monkeypatch.syspath_prepend(str(EXAMPLE))
        return load_script(EXAMPLE / "finetune.py")

    def table(self, printed: str) -> list[list[str]]:
        """The cells of the printed table, row by row."""
        lines = printed.splitlines()
        start = next(index for index, line in enumerate(lines) if line.startswith("stage "))
        return [re.split(r"  +", line) for line in lines[start + 2 : start + 7]]

    def test_the_whole_way_on_the_tiny_model(self, tmp_path):
        """One run, looked at from all sides, because it is what takes long here."""
        command = [EXAMPLE / "finetune.py", "--model", "tiny", "--steps", "20", "--output", tmp_path]
        names, ties, differences, losses, *_ = zip(*self.table(run(sys.executable, *command).stdout), strict=True)

        assert names[:3] == ("base, before training", "trained", "adapter on a fresh base")
        assert names[3:] == ("merged", "reopened without peft")
        assert ties == ("yes",) * 5
        assert differences[:2] == ("-", "-")
        assert all(float(difference) <= 1e-4 for difference in differences[2:])
        assert all(float(after) < float(losses[0]) - 1 for after in losses[1:])

        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged:
            assert "model.embed_tokens.weight" in merged.keys()
            assert "lm_head.weight" not in merged.keys(), "the tied tensor is written once"

    @pytest.mark.parametrize(
        "tie_held, difference, status",
        [(True, 9e-5, 0), (False, 0.0, 1), (True, 1.1e-4, 1), (True, float("nan"), 1)],
        ids=["fine", "tie broke", "logits moved", "logits are no numbers"],
    )
    def test_the_exit_status_tells_whether_it_went_well(
        self, finetune, monkeypatch, tmp_path, capsys, tie_held, difference, status
    ):
        stage = finetune.Stage("merged", tie_held, None, 1.0, 0, 0, difference=difference)
        monkeypatch.setattr(finetune, "run", lambda args: [stage])
        assert finetune.main(["--model", "tiny", "--output", str(tmp_path)]) == status
        assert ("FAILED" in capsys.readouterr().out) == bool(status)

    def test_speech_becomes_the_new_tokens(self, finetune):
        text = 'He said "yes,\nmy dear" and\nleft.\n\n"A letter that goes on,'
        assert finetune.mark_speech(text) == (
            "He said <|speech|>yes, my dear<|/speech|> and left.\n\n<|speech|>A letter that goes on,<|/speech|>"
        )


class TestHeaders:
    FOLDERS = ("src", "tests", "scripts", "benchmarks", "examples")
    FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

    def test_every_file_names_the_licence_and_the_project(self):
        for file in self.FILES:
            lines = file.read_text(encoding="utf-8").splitlines()
            if lines[0].startswith("#!"):
                del lines[0]
            assert lines[0] == "# SPDX-License-Identifier: Apache-2.0", file
            assert lines[1] == "# peft: the fork in which tied weights stay tied", file

    def test_every_file_says_what_it_is_for(self):
        for file in self.FILES:
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert docstring, file
            summary = docstring.partition("\n\n")[0]
            assert summary.endswith((".", ":")), f"{file}: {summary}"
