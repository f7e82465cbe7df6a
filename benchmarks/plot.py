# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The report as a picture: a ratio per line, with its spread and its goal."""

from pathlib import Path

from report import Line


COLOURS = {"met": "tab:green", "not met": "tab:red", "within noise": "tab:orange", "": "tab:blue"}


def plot(lines: list[Line], path: Path) -> None:
    """
    Draw the ratios of some lines.

    Args:
        lines: the lines; those without a ratio are left out.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in lines if line.ratio and line.ratio.low > 0][::-1]
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.36 * len(lines)), layout="constrained")
    for y, line in enumerate(lines):
        _draw(axes, y, line)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_yticks(range(len(lines)), [f"{line.title}\n{line.labels[0]} / {line.labels[1]}" for line in lines])
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", which="major", linewidth=0.4)
    axes.set_xlabel("ratio (median, least and greatest of all rounds); the bar is the goal")
    for verdict, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=verdict or "no goal")
    axes.legend(fontsize=7, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: object, y: int, line: Line) -> None:
    ratio = line.ratio
    colour = COLOURS[line.verdict]
    axes.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=2, alpha=0.6)
    axes.scatter([ratio.median], [y], color=colour, s=24, zorder=3)
    goal = line.ratio_at_most
    if line.value_at_most is not None:  # in units of what it is compared with, like the ratio
        goal = line.value_at_most / line.against.median
    if goal is not None:
        axes.plot([goal, goal], [y - 0.35, y + 0.35], color="black", linewidth=1.6)
