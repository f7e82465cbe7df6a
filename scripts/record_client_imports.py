#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Write down what an installed client imports from `peft`, into `tests/project/client_imports.json`.

usage: .venv-clients/NAME/bin/python scripts/record_client_imports.py PACKAGE...

Imports that the client may do without, as it catches an ImportError, are left out;
`tests/project/test_client_imports.py` checks that the others work.
"""

import argparse
import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path


OUT = Path(__file__).parents[1] / "tests/project/client_imports.json"
CAUGHT = {"ImportError", "ModuleNotFoundError", "Exception", "AttributeError"}


def folder_of(package: str) -> Path:
    """Find a package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed here")
    return Path(next(iter(spec.submodule_search_locations)))


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that are not guarded by a handler for their failure."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.Try) and any(map(catches, node.handlers))):
            yield from imports(node)


def catches(handler: ast.ExceptHandler) -> bool:
    """Say whether a handler catches a failed import."""
    return handler.type is None or any(
        isinstance(node, ast.Name) and node.id in CAUGHT for node in ast.walk(handler.type)
    )


def of_peft(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield (module, name); a module that is imported by itself comes with an empty name."""
    if isinstance(node, ast.Import):
        found = ((alias.name, "") for alias in node.names)
    else:
        found = ((node.module or "", alias.name) for alias in node.names if not node.level)
    yield from ((module, name) for module, name in found if module.partition(".")[0] == "peft")


def client_imports(folder: Path) -> dict[str, list[str]]:
    """Collect what the files below a folder import, by module."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:  # templates of code
            continue
        for node in imports(tree):
            for module, name in of_peft(node):
                found.setdefault(module, set()).update({name} - {"", "*"})
    return {module: sorted(found[module]) for module in sorted(found)}


def main() -> None:
    """Replace the entries of the packages that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    packages = parser.parse_args().packages
    recorded = json.loads(OUT.read_text()) if OUT.exists() else {}
    recorded.update({package: client_imports(folder_of(package)) for package in packages})
    OUT.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
