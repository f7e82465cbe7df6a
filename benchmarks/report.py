# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""From samples to a report: a judged line per row, as a table and as data."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from case import Case, Figure, Row
from harness import Samples


NOT_MEASURED = "not measured"
ONLY_ONE = "only one can"


@dataclass(frozen=True)
class Spread:
    """
    What is told about repeated measurements.

    Attributes:
        median: the middle value.
        low: the least.
        high: the greatest.
        quarter: a quarter of the values are below it.
        three_quarters: a quarter of the values are above it.
    """

    median: float
    low: float
    high: float
    quarter: float
    three_quarters: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Describe some values."""
        first, _, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), min(values), max(values), first, third)


@dataclass(frozen=True)
class Line:
    """
    A row with what was measured for it.

    Attributes:
        case: name of the case.
        title: what was done.
        unit: unit of both figures.
        measured: the figure in question; None if it was not measured.
        against: what it is compared with; None if that was not measured.
        labels: what the two are called.
        ratio: the first divided by the second, round by round.
        ratio_at_most: goal for the ratio.
        value_at_most: goal for the figure.
        verdict: "met", "not met", "within noise", "" without a goal, "only one can", or "not measured".
        why: what kept a figure from being measured.
    """

    case: str
    title: str
    unit: str
    measured: Spread | None
    against: Spread | None
    labels: tuple[str, str]
    ratio: Spread | None
    ratio_at_most: float | None
    value_at_most: float | None
    verdict: str
    why: str = ""


def make_line(case: Case, row: Row, samples: Samples) -> Line:
    """Judge a row by what was measured for its case."""
    measured, against = _values(row.measured, samples), _values(row.against, samples)
    # a round that one of the two did not finish is no pair
    ratios = [a / b for a, b in zip(measured, against) if b]  # noqa: B905
    ratio = Spread.of(ratios) if ratios else None
    value = Spread.of(measured) if measured else None
    if not samples.errors and bool(measured) != bool(against):
        verdict = ONLY_ONE
    elif row.value_at_most is not None:
        verdict = judge(value, row.value_at_most)
    else:
        verdict = judge(ratio, row.ratio_at_most)
    return Line(
        case=case.name,
        title=row.title,
        unit=row.unit or case.unit,
        measured=value,
        against=Spread.of(against) if against else None,
        labels=(row.measured.label, row.against.label),
        ratio=ratio,
        ratio_at_most=row.ratio_at_most,
        value_at_most=row.value_at_most,
        verdict=verdict,
        why="; ".join(f"{package}: {error}" for package, error in samples.errors.items()),
    )


def _values(figure: Figure, samples: Samples) -> list[float]:
    return samples.figures.get(figure.package, {}).get(figure.name, [])


def judge(spread: Spread | None, goal: float | None) -> str:
    """
    Say whether a goal was reached.

    The middle value decides, unless the goal lies within the middle half of the values: noise decides then, and
    nothing is claimed.
    """
    if spread is None:
        return NOT_MEASURED
    if goal is None:
        return ""
    if spread.quarter <= goal < spread.three_quarters:
        return "within noise"
    return "met" if spread.median <= goal else "not met"


def make_lines(cases: Iterable[Case], samples: Mapping[str, Samples]) -> list[Line]:
    """
    Judge every row of some cases.

    A figure that neither package has, though nothing failed, is one that there is not: it gets no line.
    """
    return [
        make_line(case, row, samples[case.name])
        for case in cases
        for row in case.rows
        if samples[case.name].errors or any(_values(one, samples[case.name]) for one in (row.measured, row.against))
    ]


def as_table(lines: list[Line]) -> str:
    """Write lines as a Markdown table, in which a figure is its least and its middle value."""
    header = ["what", "measured (min / median)", "against (min / median)", "ratio (spread)", "goal", "verdict"]
    body = [
        [
            line.title,
            _figure(line.measured, line.unit, line.labels[0]),
            _figure(line.against, line.unit, line.labels[1]),
            _ratio(line.ratio),
            _goal(line),
            line.verdict,
        ]
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    table = [header, ["-" * width for width in widths], *body]
    text = "\n".join(f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in table)
    problems = dict.fromkeys(f"{line.case}: {line.why}" for line in lines if line.why)
    return "\n".join([text, *problems])


def _figure(spread: Spread | None, unit: str, label: str) -> str:
    if spread is None:
        return f"{label}: {NOT_MEASURED}"
    return f"{label}: {_amount(spread.low, unit)} / {_amount(spread.median, unit)}"


def _amount(value: float, unit: str) -> str:
    if unit not in ("CPU s", "wall s"):
        return f"{value:.2f} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _goal(line: Line) -> str:
    if line.value_at_most is not None:
        return f"<= {line.value_at_most:g} {line.unit}"
    return "" if line.ratio_at_most is None else f"ratio <= {line.ratio_at_most:.3g}"


def as_data(
    lines: list[Line], samples: Mapping[str, Samples], versions: Mapping[str, Any], machine: Mapping[str, str]
) -> dict[str, Any]:
    """Give everything that was measured, for a JSON file."""
    return {
        "machine": dict(machine),
        "versions": dict(versions),
        "rows": [asdict(line) for line in lines],
        "samples": {name: asdict(one) for name, one in samples.items()},
    }
