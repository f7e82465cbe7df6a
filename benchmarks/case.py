# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a benchmark case is: something to measure in both packages, and the lines of the report that follow from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


OURS = "ours"
RELEASED = "released"

Start = Callable[[], Iterator[dict[str, float]]]


@dataclass(frozen=True)
class Figure:
    """
    One of the numbers that a case measures.

    Attributes:
        package: in which of the two packages, `OURS` or `RELEASED`.
        name: key of the figure in what the case yields.
        label: what to call it in the report.
    """

    package: str
    name: str
    label: str


def ours(name: str, label: str = OURS) -> Figure:
    """A figure of the package under development."""
    return Figure(OURS, name, label)


def released(name: str, label: str = RELEASED) -> Figure:
    """A figure of the released package."""
    return Figure(RELEASED, name, label)


@dataclass(frozen=True)
class Row:
    """
    A line of the report: a figure, what it is compared with, and what is to be reached.

    Attributes:
        title: what was done.
        measured: the figure.
        against: the figure that it is divided by, round by round.
        ratio_at_most: goal for the ratio; None if the line is for information or has a goal for the value.
        value_at_most: goal for the figure itself.
        unit: unit of both figures; that of the case if left out.
    """

    title: str
    measured: Figure
    against: Figure
    ratio_at_most: float | None = None
    value_at_most: float | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Case:
    """
    Something to measure.

    Attributes:
        name: what `--only` looks for.
        unit: unit of every figure of the case whose row does not name another.
        rows: the lines of the report.
        start: makes a generator that prepares, and then yields one set of figures per round.
        rounds: how many rounds are measured, unless the caller says otherwise.
        packages: which packages it runs in.
        fresh_process: start a new worker for each round, as figures about memory need it.
    """

    name: str
    unit: str
    rows: Sequence[Row]
    start: Start
    rounds: int = 5
    packages: Sequence[str] = (OURS, RELEASED)
    fresh_process: bool = False


CASES: dict[str, Case] = {}


def case(name: str, unit: str, rows: Sequence[Row], **options: object) -> Callable[[Start], Start]:
    """
    Enter a generator function into the list of cases; the arguments are those of `Case`.

    The function imports peft by itself, since it runs in a worker that has one of the two packages. What it does
    before its first `yield` is done once, what it does between two is done in each round; it times what counts.
    """

    def enter(start: Start) -> Start:
        CASES[name] = Case(name, unit, rows, start, **options)
        return start

    return enter
