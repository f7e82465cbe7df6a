# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The documentation is true: its code runs and prints what stands there, and its links lead somewhere.

The `python` blocks of a page run from top to bottom in one namespace. A `text` block that directly follows one is what
it prints. A `PeftWarning` that a block does not deal with is an error.
"""

import contextlib
import doctest
import importlib
import io
import re
import socket
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.registry import methods_put_back, strategies_put_back

import peft
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "source"
PACKAGE = Path(peft.__file__).parent

EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *EXAMPLES]
PAGES = [page for page in PAGES if page.exists()]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]

FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass
class Block:
    """A fenced block of a page: its info string, its text, the line it starts in, and what it should print."""

    info: str
    text: str
    line: int
    prints: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """Read the fenced blocks of a page."""
    content = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = None
    for match in FENCE.finditer(content):
        block = Block(match[1], match[2], content.count("\n", 0, match.start()) + 1)
        follows = end is not None and not content[end : match.start()].strip()
        if block.info == "text" and follows and blocks[-1].info == "python":
            blocks[-1].prints = block.text
        blocks.append(block)
        end = match.end()
    return blocks


def prose_of(page: Path) -> str:
    """Read a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """Give the names by which the headings of a page can be linked to."""
    return {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in HEADING.findall(prose_of(page))
    }


def links_of(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield each link to another file or heading of the project: as written, file, heading."""
    for link in LINK.findall(prose_of(page)):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            yield link, (page.parent / target).resolve() if target else page, anchor


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, no network, and a registry of methods whose changes are forgotten afterwards."""

    def refuse(*args: object) -> None:
        raise OSError("examples must run without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with methods_put_back(), strategies_put_back():
        yield tmp_path


@pytest.mark.filterwarnings("error::peft.PeftWarning")
@each_page
def test_code_of_a_page_runs_and_prints_what_stands_there(page, alone, monkeypatch):
    # classes that a page defines are looked up in their module, for example to be pickled
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks_of(page):
        if block.info != "python":
            continue
        printed = io.StringIO()
        code = compile("\n" * block.line + block.text, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, module.__dict__)
        if block.prints is not None:
            assert printed.getvalue() == block.prints, f"{page}:{block.line}"


@each_page
def test_code_blocks_say_what_they_are(page):
    """No code escapes the test above: what cannot run is marked as text."""
    assert {block.info for block in blocks_of(page)} <= {"python", "text", "bash"}


@each_page
def test_links_lead_somewhere(page):
    for link, target, anchor in links_of(page):
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_can_be_reached_from_the_index():
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            waiting += [target for _, target, _ in links_of(page)]
    assert {*DOCS.rglob("*.md"), *EXAMPLES} <= reached


def test_every_example_has_a_command():
    """`make example NAME=...` runs the module in the folder of that name."""
    for page in EXAMPLES:
        for name in re.findall(r"make example NAME=(\w+)", page.read_text(encoding="utf-8")):
            assert name == page.parent.name and (page.parent / "__main__.py").is_file()
    assert {path.parent for path in ROOT.glob("examples/*/__main__.py")} <= {page.parent for page in EXAMPLES}


@each_page
def test_commands_exist(page):
    """Every `make TARGET` that a page speaks of is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    spoken_of = set(re.findall(r"(?:`|^    |^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert spoken_of <= targets


@pytest.mark.filterwarnings("error::peft.PeftWarning")
@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings(path, alone):
    name = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("method", sorted(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_a_method_has_a_page_and_rows(method: str) -> None:
    """Its config is on a page of the reference, to which a row of the index leads, and the guide counts its lines."""
    config = re.compile(rf"\b{PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__}\b")
    pages = [page.name for page in DOCS.glob("package_reference/*.md") if config.search(page.read_text("utf-8"))]
    assert pages, f"no page of package_reference tells of {config.pattern}"
    rows = [line for line in (DOCS / "index.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert any(f"(package_reference/{page})" in row for page in pages for row in rows)
    guide = (DOCS / "developer_guides" / "architecture.md").read_text("utf-8")
    assert re.search(rf"^\| `?{method}`? \|", guide, re.MULTILINE)
