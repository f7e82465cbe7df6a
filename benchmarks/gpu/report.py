# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The figures as a table and as a picture."""

from pathlib import Path
from typing import Any

from rows import ROWS


WAYS = ("base", "hand", "released", "ladder", "fused")
COLOURS = {"hand": "tab:gray", "released": "tab:red", "ladder": "tab:orange", "fused": "tab:green"}


def ratio(row: dict[str, Any], way: str) -> float | None:
    """Give the time of a way as a multiple of the base model's in the same process; None if it is not known."""
    base = row.get(way, {}).get("base_ms") or row.get("base", {}).get("ms")
    own = row.get(way, {}).get("ms")
    return own / base if own and base else None


def as_table(results: dict[str, Any]) -> str:
    """
    Write a table in Markdown: milliseconds, in brackets the multiple of the base model's; goals; share of the bound.

    Args:
        results: what the workers have measured.
    """
    machine = results.get("machine", {})
    lines = [
        f"{machine.get('name')}, torch {machine.get('torch')}; a product reaches "
        f"{machine.get('flops_per_s', 0) / 1e12:.0f} TFLOP/s, a copy {machine.get('bytes_per_s', 0) / 1e12:.2f} TB/s",
        "",
        "| row | " + " | ".join(WAYS) + " | goal | fused of its bound | peak GB: base, ladder, fused | goal |",
        "| --- " * (len(WAYS) + 5) + "|",
    ]
    for name, row in results["rows"].items():
        goal = ROWS[name]
        share = row.get("fused", {})
        reached = f"{share['bound_ms'] / share['ms']:.0%}" if share.get("bound_ms") and share.get("ms") else "-"
        peaks = [row.get(way, {}).get("peak_gb") for way in ("base", "ladder", "fused")]
        wanted = f"{goal.goal_ms:g} ms" if goal.goal_ms else f"{goal.goal_ratio:g}x" if goal.goal_ratio else "-"
        memory = ", ".join("-" if peak is None else f"{peak:.1f}" for peak in peaks)
        cells = [_cell(row, way) for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} | {wanted} | {reached} | {memory} | {goal.goal_gb or '-'} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], way: str) -> str:
    found = row.get(way, {})
    if "error" in found:
        return found["error"].replace("|", "/")[:60]
    if "ms" not in found:
        return "-"
    multiple = ratio(row, way)
    more = "".join(f", {key[:-2]} {value:.2f} s" for key, value in found.items() if key.endswith("_s"))
    return f"{found['ms']:.1f}" + (f" ({multiple:.2f})" if multiple and way != "base" else "") + more


def plot(results: dict[str, Any], path: Path) -> None:
    """
    Draw the multiples of the base model's time.

    Args:
        results: what the workers have measured.
        path: the PNG file to write; nothing is written without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name, row in results["rows"].items() if any(ratio(row, way) for way in COLOURS)][::-1]
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.5 * len(names)), layout="constrained")
    for place, (way, colour) in enumerate(COLOURS.items()):
        known = [(y, ratio(results["rows"][name], way)) for y, name in enumerate(names)]
        known = [(y, value) for y, value in known if value]
        heights = [y + 0.3 - 0.2 * place for y, _ in known]
        axes.barh(heights, [value for _, value in known], height=0.18, color=colour, label=way)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("time as a multiple of the base model's")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
