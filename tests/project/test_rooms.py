# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rooms of the package: files that can be read in one go, old import paths that are tables, names that resolve."""

import ast
import importlib
import importlib.util
import json
from pathlib import Path

import pytest

import peft
from peft.utils import old_names


PACKAGE = Path(peft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 600
# file -> why it is longer
LONGER: dict[str, str] = {}
# of the names of the release and of what clients import, those that resolve (scripts/record_import_paths.py)
IMPORT_PATHS: dict[str, list[str]] = json.loads((Path(__file__).parent / "import_paths.json").read_text("utf-8"))


def name_of(file: Path) -> str:
    """The path inside the package, as one reads it."""
    return file.relative_to(PACKAGE).as_posix()


def is_here(module: str) -> bool:
    """Whether a module exists; packages of methods to come do not."""
    parent = module.rpartition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def calls_lazy_exports(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_exports"


def tables() -> list[Path]:
    """Files that say where names are; packages do so too, and may do more."""
    modules = [file for file in FILES if file.name != "__init__.py"]
    return [file for file in modules if any(map(calls_lazy_exports, ast.walk(ast.parse(file.read_text("utf-8")))))]


each_table = pytest.mark.parametrize("file", tables(), ids=name_of)


def test_files_are_short() -> None:
    lengths = {name_of(file): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length >= MOST_LINES and name not in LONGER} == {}


@each_table
def test_table_holds_nothing_else(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    assert ast.get_docstring(tree).startswith("Table of names: ")
    docstring, imported, assigned = tree.body
    assert isinstance(imported, ast.ImportFrom) and [alias.name for alias in imported.names] == ["lazy_exports"]
    assert isinstance(assigned, ast.Assign) and calls_lazy_exports(assigned.value)
    assert [ast.unparse(target) for target in assigned.targets] == ["(__getattr__, __dir__, __all__)"]
    package, names = assigned.value.args
    assert ast.unparse(package) == "__name__" and ast.literal_eval(names)


@each_table
def test_names_of_table_resolve(file: Path) -> None:
    module = importlib.import_module(".".join(("peft", *file.relative_to(PACKAGE).with_suffix("").parts)))
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name, None) is not None, name


def test_there_are_tables() -> None:
    assert {"peft_model.py", "tuners/tuners_utils.py", "utils/save_and_load.py"} <= set(map(name_of, tables()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", IMPORT_PATHS)
def test_import_path_works(path: str) -> None:
    module = importlib.import_module(path)
    for name in IMPORT_PATHS[path]:
        found = module
        for part in name.split("."):
            assert hasattr(found, part), f"{path} has no {name}"
            found = getattr(found, part)


class TestOldNames:
    def test_every_row_resolves(self) -> None:
        seen = set()
        for home, names, modules in old_names._ROWS:
            for module in filter(is_here, (f"peft.{module}" for module in modules.split())):
                seen.add(module)
                for name in names.split():
                    expected = getattr(importlib.import_module(home), name)
                    assert getattr(importlib.import_module(module), name, None) == expected, f"{module} has no {name}"
        assert {"peft.tuners.lora.model", "peft.tuners.adalora.model", "peft.helpers"} <= seen

    @pytest.mark.parametrize("method", sorted(folder.parent.name for folder in PACKAGE.glob("tuners/*/layer.py")))
    def test_modules_of_every_method_give_them(self, method: str) -> None:
        if method in ("lora", "shadow"):
            pytest.skip("its layers are of more kinds, with rows of their own")
        for home, names, kinds in old_names._OF_METHODS:
            for kind in kinds.split():
                module = f"peft.tuners.{method}" if kind == "__init__" else f"peft.tuners.{method}.{kind}"
                for name in names.split():
                    expected = getattr(importlib.import_module(home), name)
                    assert getattr(importlib.import_module(module), name, None) == expected, f"{module} has no {name}"

    def test_models_give_what_their_neighbours_have(self) -> None:
        module = importlib.import_module("peft.tuners.gralora.model")
        assert module.GraloraLayer is peft.tuners.gralora.layer.GraloraLayer
        assert module.TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018

    def test_other_names_are_no_attributes(self) -> None:
        with pytest.raises(AttributeError, match=r"module 'peft.tuners.vera.layer' has no attribute 'nothing'"):
            importlib.import_module("peft.tuners.vera.layer").nothing  # noqa: B018
        assert not hasattr(importlib.import_module("peft.tuners.vera"), "nothing")
