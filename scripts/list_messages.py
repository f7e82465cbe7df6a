# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
List every message of the package: what its errors say and what it warns about.

With `--missing` only those that the page on troubleshooting has no entry for. An entry is the first cell of a row of a
table there, in backticks, and covers each message that it is a part of; `...` in it stands for anything.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft"
PAGE = ROOT / "docs" / "source" / "developer_guides" / "troubleshooting.md"

# built-in classes that checks of a config's fields raise
BUILT_IN = {"ValueError", "TypeError"}
# functions that put messages together for others to raise or to warn with
MAKES_MESSAGES = re.compile(r"_?(describe|explain|remedy|text)_")
HOLE = "..."
ENTRY = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@dataclass(frozen=True)
class Message:
    """What one place of the code says, with `...` for what differs from time to time."""

    text: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def trees() -> dict[Path, ast.Module]:
    """Parse every file of the package."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def error_classes(modules: dict[Path, ast.Module]) -> set[str]:
    """Find the names of `PeftError` and of all classes that derive from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"PeftError"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found


def text_of(node: ast.AST) -> str:
    """Turn an expression into text, with holes where its value is not known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("{}", HOLE)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def texts_of(node: ast.AST) -> list[str]:
    """List the texts that an expression can be: both sides of a condition are."""
    if isinstance(node, ast.IfExp):
        return texts_of(node.body) + texts_of(node.orelse)
    text = re.sub(r"(\.\.\.)+", HOLE, text_of(node))
    is_message = " " in text.strip() and len(re.sub(r"\W", "", text)) >= 8
    return [text] if is_message else []  # others are names, and joints of texts


def values_of(name: str, scope: ast.AST) -> list[ast.AST]:
    """List what is assigned to a name somewhere in a function or a file."""
    return [
        node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]


def strings_in(function: ast.AST) -> Iterator[ast.AST]:
    """Yield what a function that makes messages returns, or puts together to return it."""
    for node in ast.walk(function):
        if isinstance(node, (ast.Return, ast.Assign, ast.AugAssign)) and node.value is not None:
            yield node.value
            if isinstance(node.value, ast.Call):
                yield from node.value.args


def expressions_in(function: ast.FunctionDef, tree: ast.Module, raised: set[str]) -> Iterator[ast.AST]:
    """Yield the expressions of messages that a function of a file raises, warns with, or makes for others."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in raised and node.args:
            message = node.args[0]
            if (
                isinstance(message, ast.Call)
                and isinstance(message.func, ast.Attribute)
                and message.func.attr == "format"
            ):
                message = message.func.value
            if isinstance(message, ast.Name):
                yield from values_of(message.id, function) or values_of(message.id, tree)
            else:
                yield message
    if MAKES_MESSAGES.match(function.name):
        yield from strings_in(function)


def messages() -> list[Message]:
    """Gather every message, in the order of files and lines."""
    modules = trees()
    raised = error_classes(modules) | BUILT_IN | {"warn"}
    found = set()
    for path, tree in modules.items():
        for function in ast.walk(tree):
            for expression in expressions_in(function, tree, raised) if isinstance(function, ast.FunctionDef) else ():
                file = path.relative_to(ROOT).as_posix()
                found |= {Message(text, file, expression.lineno) for text in texts_of(expression)}
    return sorted(found, key=lambda message: (message.file, message.line, message.text))


def entries() -> list[str]:
    """Read the entries of the page."""
    return ENTRY.findall(PAGE.read_text(encoding="utf-8"))


def covers(entry: str, message: Message) -> bool:
    """Say whether an entry is a part of a message."""
    pattern = ".*".join(re.escape(part.strip()) for part in entry.split(HOLE))
    return re.search(pattern, message.text) is not None


def missing() -> list[Message]:
    """List the messages that no entry covers."""
    known = entries()
    return [message for message in messages() if not any(covers(entry, message) for entry in known)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--missing", action="store_true", help="only those without an entry in the guide")
    arguments = parser.parse_args(argv)
    listed = missing() if arguments.missing else messages()
    for message in listed:
        print(message)
    return int(arguments.missing and bool(listed))


if __name__ == "__main__":
    sys.exit(main())
