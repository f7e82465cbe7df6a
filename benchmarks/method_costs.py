# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Write the tables and the plot of the guide about what methods cost, from what benchmarks have measured.

    python benchmarks/run.py --only '^(methods|structure)/'
    python benchmarks/method_costs.py [outputs/benchmarks.json ...]
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from environment import ROOT


GUIDE = ROOT / "docs/source/developer_guides/method_costs.md"
PLOT = GUIDE.with_suffix(".png")


class Column(NamedTuple):
    """
    What is told about every method.

    Attributes:
        row: what the line of the report is called.
        title: head of the column.
        shown: what a figure is multiplied by.
        form: how it is written.
    """

    row: str
    title: str
    shown: float
    form: str


COLUMNS = (
    Column("trained parameters", "trained", 1, "{:,.0f}"),
    Column("on disk", "on disk, KiB", 1, "{:,.0f}"),
    Column("training step", "step, ms", 1e3, "{:.1f}"),
    Column("single token", "token, ms", 1e3, "{:.2f}"),
    Column("peak memory of a step", "peak, MiB", 1 / 1024, "{:.1f}"),
    Column("injection", "injection, ms", 1e3, "{:.1f}"),
    Column("merge", "merge, ms", 1e3, "{:.1f}"),
)
PLOTTED = COLUMNS[:5]

Rows = dict[str, dict[str, dict[str, Any]]]


def read(paths: Iterable[Path]) -> tuple[Rows, Rows, dict[str, Any]]:
    """
    Read reports.

    Args:
        paths: JSON files that `run.py` has written.

    Returns:
        Method -> what was measured -> line of the report; the same for wide layers; and the last file's content.
    """
    kinds: dict[str, Rows] = {"methods": {}, "structure": {}}
    data: dict[str, Any] = {}
    for path in paths:
        data = json.loads(path.read_text())
        for row in data["rows"]:
            kind, _, method = row["case"].partition("/")
            if kind in kinds:
                kinds[kind].setdefault(method, {})[row["title"].partition(": ")[2]] = row
    return *(dict(sorted(rows.items())) for rows in kinds.values()), data


def figure(row: dict[str, Any] | None, column: Column) -> str:
    """Write the least value of a line and its ratio to the release, or what there is of them."""
    if row is None or row["measured"] is None:
        return "-"
    value = column.form.format(row["measured"]["low"] * column.shown)
    return f"{value} ({row['ratio']['median']:.2f})" if row["ratio"] else value


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Write a Markdown table, all of whose columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def methods_table(rows: Rows) -> str:
    """Write the table of all methods."""
    head = ["method", *(column.title for column in COLUMNS)]
    return table(head, ([name, *(figure(found.get(c.row), c) for c in COLUMNS)] for name, found in rows.items()))


def wide_table(rows: Rows) -> str:
    """Write the table of the methods whose deltas have a structure."""
    lines = []
    for name, found in rows.items():
        step = next(row for title, row in found.items() if title.startswith("forward"))
        bare, peak = found["the bare layer"], found["peak memory of that"]
        ms = [f"{spread['low'] * 1e3:.0f}" for spread in (bare["measured"], step["measured"], step["against"])]
        mib = [f"{peak[side]['low']:.0f}" for side in ("measured", "against")]
        lines.append([name, *ms, f"{step['ratio']['median']:.2f}", *mib])
    return table(
        ["method", "bare layer, ms", "ours, ms", "0.21.2, ms", "ratio", "ours, peak MiB", "0.21.2, peak MiB"], lines
    )


def put(text: str, name: str, content: str) -> str:
    """Replace what stands between the two marks of a name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{GUIDE} has no place for {name}: {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def plot(rows: Rows, path: Path) -> None:
    """
    Draw a panel per column, with a line per method: ours as a dot, the release as a ring.

    Args:
        rows: what was measured.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(rows)[::-1]
    panels, axes = plt.subplots(
        1, len(PLOTTED), figsize=(15, 1.5 + 0.22 * len(names)), sharey=True, layout="constrained"
    )
    for panel, column in zip(axes, PLOTTED, strict=True):
        for side, style in (
            ("against", {"facecolors": "none", "edgecolors": "tab:orange", "s": 42, "label": "0.21.2"}),
            ("measured", {"color": "tab:blue", "s": 14, "label": "ours"}),
        ):
            places = [(y, rows[name].get(column.row)) for y, name in enumerate(names)]
            known = [(y, row[side]["low"] * column.shown) for y, row in places if row and row[side]]
            panel.scatter([value for _, value in known], [y for y, _ in known], **style)
        panel.set_xscale("log")
        if column.shown != 1:  # less than two powers of ten
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(column.title, fontsize=9)
        panel.grid(axis="both", linewidth=0.3)
        panel.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(-0.7, len(names) - 0.3)
    axes[-1].legend(fontsize=8)
    panels.savefig(path, dpi=110)
    plt.close(panels)


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description="Write the tables and the plot of what methods cost.")
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "outputs" / "benchmarks.json"])
    rows, wide, data = read(parser.parse_args().files)
    parts: dict[str, tuple[Rows, Callable[[Rows], str]]] = {
        "methods": (rows, methods_table),
        "wide layers": (wide, wide_table),
    }
    text = GUIDE.read_text(encoding="utf-8")
    for name, (found, written) in parts.items():
        if found:
            text = put(text, name, written(found))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"]["ours"].items() if name != "peft")
    machine = data["machine"]
    text = put(text, "machine", f"Measured on {machine['processor']}, {machine['cores']} cores, with {versions}.")
    GUIDE.write_text(text, encoding="utf-8")
    if rows:
        plot(rows, PLOT)


if __name__ == "__main__":
    main()
