# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Regular expressions from configs, which may come from anywhere: matched as `re` does it, but in bounded time.

`re` cannot be stopped, and tries every way in which an expression can divide a name. An expression that has few ways
is left to it, so that time is bounded by counting. Others are matched by `regex`, which takes the same expressions and
can be stopped; what that module could not even compile in bounded time and memory is refused.
"""

import math
import re
import time
from functools import lru_cache
from typing import Any

from .error import PeftValueError


MAX_LENGTH = 100_000
# ways to divide a name that `re` may try; more than a second's work
MAX_WAYS = 10**8
NAME_LENGTH = 100
# what `regex` expands while it compiles: repeated groups double, counted repeats are written out
MAX_COMPLEX_LENGTH, MAX_REPEATED_GROUPS, MAX_COUNT = 2_000, 5, 10_000
# seconds: what matching one name, and all names of a model, may take beyond what matching usually takes
ONE_MATCH, ALL_MATCHES, USUAL_MATCH = 0.5, 2.0, 2e-4

_ESCAPES_AND_SETS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


class BoundedPattern:
    """
    A regular expression that is matched in bounded time.

    Args:
        pattern: a regular expression, as `re` takes it.

    Raises:
        PeftValueError: if it is not a regular expression, or too complex to be matched in bounded time.
    """

    def __init__(self, pattern: str):
        self._pattern = pattern
        self._spent = 0.0
        self._options: dict[str, Any] = {}
        if len(pattern) > MAX_LENGTH:
            raise PeftValueError(
                f"{_short(pattern)} has {len(pattern):,d} characters, and at most {MAX_LENGTH:,d} are taken for a "
                "regular expression; give a list of names instead"
            )
        try:
            self._expression: Any = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise PeftValueError(f"{_short(pattern)} is not a valid regular expression: {error}") from error
        if _ways(pattern) > MAX_WAYS:
            self._expression = _interruptible(pattern)
            self._options = {"timeout": ONE_MATCH}

    def fullmatch(self, name: str) -> Any:
        """Match a whole name; see `re.fullmatch`."""
        return self._bounded(self._expression.fullmatch, name)

    def match(self, name: str) -> Any:
        """Match the beginning of a name; see `re.match`."""
        return self._bounded(self._expression.match, name)

    def _bounded(self, match: Any, name: str) -> Any:
        start = time.perf_counter()
        try:
            found = match(name, **self._options)
        except TimeoutError:
            found, self._spent = None, math.inf
        self._spent = max(0.0, self._spent + time.perf_counter() - start - USUAL_MATCH)
        if self._spent > ALL_MATCHES:
            self._spent = 0.0
            raise PeftValueError(
                f"matching {_short(self._pattern)} against names of modules takes too long, the last was {name!r}: "
                "the expression can divide a name in too many ways. Give a list of names, or avoid repeats in repeats"
            )
        return found


@lru_cache(maxsize=256)
def compiled(pattern: str) -> BoundedPattern:
    """
    Compile a regular expression once.

    Args:
        pattern: a regular expression, as `re` takes it.

    Raises:
        PeftValueError: if it is not one, or too complex.

    Example:

        >>> from peft.utils.patterns import compiled
        >>> bool(compiled(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj"))
        True
    """
    return BoundedPattern(pattern)


def _ways(pattern: str) -> float:
    """Count, from above, the ways in which an expression can divide a name."""
    structure = _ESCAPES_AND_SETS.sub("x", pattern).replace("(?", "(")
    if re.search(r"\)[*+{]", structure) or re.search(r"\\[1-9]|\(\?P=|\(\?\(", pattern):
        return math.inf
    ways = 2.0 ** structure.count("?")
    ways *= float(NAME_LENGTH) ** sum(map(structure.count, "*+{"))
    choices = [1]
    for character in structure:
        if character == "(":
            choices.append(1)
        elif character == "|":
            choices[-1] += 1
        elif character == ")" and len(choices) > 1:
            ways *= choices.pop()
        if ways > MAX_WAYS:
            return ways
    return ways * choices[0]


def _interruptible(pattern: str) -> Any:
    """Compile an expression with `regex`, unless that would take too long, or mean something else there."""
    structure = _ESCAPES_AND_SETS.sub("x", pattern)
    counts = [max(int(low or 1), int(high or 1)) for low, high in _COUNTS.findall(structure)]
    too_complex = (
        len(pattern) > MAX_COMPLEX_LENGTH
        or len(re.findall(r"\)[*+{]", structure)) > MAX_REPEATED_GROUPS
        or math.prod(counts) > MAX_COUNT
        or structure.count("{") > len(counts)
        or "[:" in pattern
    )
    if too_complex:
        raise PeftValueError(
            f"{_short(pattern)} is too complex to be matched in bounded time: it has too many repeats and choices. "
            "Give a list of names instead"
        )
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise PeftValueError(f"{_short(pattern)} is not a valid regular expression: {error}") from error


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
