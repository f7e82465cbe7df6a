#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Write down which import paths of the release and of its clients work, into `tests/project/import_paths.json`.

usage: record_import_paths.py COMPAT_DIR [OUT]

A compat folder holds `api.json` (what each module of the release offers) and `clients.json` (what clients import).
What resolves with the installed package is written, and `tests/project/test_rooms.py` checks that it goes on to do so.
"""

import argparse
import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path


OUT = Path(__file__).parents[1] / "tests/project/import_paths.json"


def import_paths(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name); a module that is imported by itself comes with an empty name."""
    for module, facts in json.loads((folder / "api.json").read_text())["modules"].items():
        yield module, ""
        yield from ((module, name) for name, found in facts["public"].items() if is_home(module, name, found, facts))
    for facts in json.loads((folder / "clients.json").read_text()).values():
        for use in facts["uses"]:
            yield use["from"], use["name"].replace("<module>", "")
        for use in facts.get("attribute_uses", ()):
            if not use["attr"].startswith("<"):
                yield tuple(use["attr"].split(".", 1))


def is_home(module: str, name: str, found: dict, facts: dict) -> bool:
    """Say whether a module offers a name, and does not merely use it."""
    defined = found.get("ref", "").partition(":")[0] == module
    return facts["is_package"] or defined or name in (facts.get("all") or ())


def resolves(module: str, name: str) -> bool:
    """Say whether a path works; a name may have dots."""
    try:
        found = importlib.import_module(module)
        for part in filter(None, name.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def record(folder: Path, out: Path) -> None:
    """Write what resolves, by module."""
    found: dict[str, list[str]] = {}
    for module, name in sorted(set(import_paths(folder))):
        if resolves(module, name):
            found.setdefault(module, []).append(name)
    lines = [f"{json.dumps(module)}: {json.dumps(sorted(filter(None, names)))}" for module, names in found.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("compat", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    record(arguments.compat, arguments.out)
