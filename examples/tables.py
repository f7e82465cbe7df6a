# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tables as plain text."""


def table(rows: list[list[str]]) -> str:
    """Align the columns of rows, the first of which is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
