# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Plain values as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """
    Write rows in columns; columns of numbers are flush right.

    Args:
        head: titles.
        rows: a value per title.
    """
    rows = [list(row) for row in rows]
    numbers = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    lines = [list(head), *([as_text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )


def facts(values: Mapping[str, Any]) -> str:
    """Write names and values, one pair a line; what is None is left out."""
    present = {name: value for name, value in values.items() if value is not None}
    width = max(map(len, present), default=0)
    return "\n".join(f"{name.ljust(width)}  {as_text(value)}" for name, value in present.items())


def as_text(value: Any) -> str:
    """Write one value: large numbers with separators, sequences without brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,d}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def size(count: int) -> str:
    """Write a number of bytes in a unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
