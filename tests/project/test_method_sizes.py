# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods stay small, and the architecture guide says how small."""

import sys
from pathlib import Path

import pytest
from support.scripts import load_script


ROOT = Path(__file__).parents[2]
counting = load_script(ROOT / "scripts" / "count_method_lines.py")
SIZES = {size.name: size for size in counting.method_sizes()}

LIMIT = 60
# method -> how many lines it may have, and why they are more
EXCEPTIONS = {
    "LORA": (
        5300,
        "seven kinds of layers, parameters as targets, starts, some of which learn from data, variants, conversion",
    ),
    "FROD": (160, "it factors weights anew by the basis of a file, and has bases by role beside the layers"),
    "ADALORA": (350, "it hands out ranks while training, which no other method does"),
    "LILY": (75, "layers of a group share their factors"),
    "POLY": (115, "a router, and tasks that callers give to layers, models and `generate`"),
    "ADAPTION_PROMPT": (
        350,
        "whole attention modules are wrapped, of three architectures, without a base weight to merge",
    ),
    "SHADOW": (640, "a second model beside the first one, with its loss, its cache, and a life of its own"),
    "CARTRIDGE": (210, "frozen rows, starts from caches and texts, and cartridges put together"),
    "CPT": (130, "balls around a context, and a loss of its own"),
    "XLORA": (400, "a classifier, two passes per call, experts that are read, and a log of their weights"),
    "HIRA": (80, "one product instead of two, where a base layer is its weight and no digits get lost"),
    "OSF": (100, "it starts from a decomposition that is made once, and its model has a signature of its own"),
    "ADAMSS": (175, "it freezes what matters least while training, and tells callers of it"),
    "UNILORA": (85, "callers set where entries of its vector go, and what they are multiplied by there"),
    "MULTITASK_PROMPT_TUNING": (80, "prompts of several tasks"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_method_is_its_math(name):
    """If this fails, ask first what the base is missing."""
    allowed, _ = EXCEPTIONS.get(name, (LIMIT, ""))
    assert SIZES[name].lines <= allowed


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_is_needed(name):
    assert SIZES[name].lines > LIMIT


def test_the_guide_shows_what_the_script_prints():
    """If this fails, run `python scripts/count_method_lines.py --write`."""
    assert counting.tables_in(counting.GUIDE.read_text(encoding="utf-8")) == counting.tables()


def test_the_guide_has_each_row_once():
    """Merging two versions of the guide leaves rows of both; `--write` takes them away."""
    rows = [line for line in counting.GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    titles = [row.split("|")[1].strip(" `").partition("`")[0].strip() for row in rows if not row.startswith("| ---")]
    measured = {*SIZES, *counting.SHARED, "all other files of"}
    assert {title: titles.count(title) for title in measured if title not in counting.BEFORE} == dict.fromkeys(
        measured - set(counting.BEFORE), 1
    )
    rows_of_others = counting.tables() + "\n| all other files of `tuners/`: the base of every method | 1 |\n\nafter\n"
    assert counting.tables_in(rows_of_others) == rows_of_others.removesuffix("\n\nafter\n")


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    guide = tmp_path / "guide.md"
    guide.write_text(f"before\n\n{counting.tables().replace('LORA', 'OLD')}\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(counting, "GUIDE", guide)
    monkeypatch.setattr(sys, "argv", ["count_method_lines.py", "--write"])
    counting.main()
    monkeypatch.setattr(sys, "argv", ["count_method_lines.py"])
    counting.main()
    assert guide.read_text(encoding="utf-8") == f"before\n\n{capsys.readouterr().out}\nafter\n"


def test_what_is_a_line_of_code():
    source = '''"""A docstring
of two lines."""

# a comment
import os  # counts


def join(parts):
    """Another one."""
    text = """three
    lines
    of text"""
    return os.path.join(
        *parts,
        # not this one
        text,
    )
'''
    assert counting.count_lines(source) == 9


def test_every_method_of_the_package_is_measured():
    folders = {path.parent for path in counting.TUNERS.glob("*/__init__.py")}
    assert len(SIZES) == len({path for path in folders if (path / "config.py").exists()})
    assert all(size.lines and size.config and size.registration for size in SIZES.values())


def test_tables_of_old_names_count_as_registration():
    assert counting.is_table(counting.TUNERS / "c3a" / "utils.py")
    assert not counting.is_table(counting.TUNERS / "c3a" / "maths.py")


def test_nothing_that_methods_share_is_left_out():
    folders = ("tuners/families", "prompts")
    files = {
        path.relative_to(counting.PACKAGE).as_posix() for d in folders for path in (counting.PACKAGE / d).glob("*.py")
    }
    assert {path for path in files if not path.endswith("__init__.py")} <= set(counting.SHARED)
    assert all((counting.PACKAGE / path).exists() for path in counting.SHARED)
