# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Regular expressions of configs: the same matches as `re` gives, in bounded time."""

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile_folders import EXPRESSIONS

from peft.anatomy.matching import pattern_lookup
from peft.utils.error import PeftValueError
from peft.utils.patterns import MAX_WAYS, BoundedPattern, _interruptible, _ways, compiled


PIECES = (
    r".*",
    r".+?",
    r"\d+",
    r"\w*",
    r"[^.]+",
    r"(q|v)_proj",
    r"(?:up|down)",
    r"(?:\w+\.)*",
    r"(a|ab)*",
    r"x{1,3}",
    r"(?!head)",
    r"(?=.*up)",
    r"\.",
    "layers",
    "head",
    "up",
    "|",
    "?",
    "^",
    "$",
    r"\b",
    r"[a-z_]",
    r"(\w)\1",
    r"(?P<n>l)",
    r"(?P=n)",
    "(?i:UP)",
    "é",
)
NAMES = (
    "layers.0.up",
    "layers.11.self_attn.q_proj",
    "head",
    "",
    "a.b",
    "ababab",
    "xxx.up",
    "LAYERS.0.UP",
    "é.up",
    "x\ny",
)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.sampled_from(NAMES))
def test_matches_are_those_of_re(pattern: str, name: str) -> None:
    try:
        wanted = re.compile(pattern)
    except re.error:
        with pytest.raises(PeftValueError, match="not a valid regular expression"):
            BoundedPattern(pattern)
        return
    for match in ("fullmatch", "match"):
        expected = getattr(wanted, match)(name)
        found = getattr(BoundedPattern(pattern), match)(name)
        assert (found and found.span()) == (expected and expected.span())
        other = getattr(_interruptible(pattern), match)(name)  # whichever of the two was chosen
        assert (other and other.span()) == (expected and expected.span())


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"^model\.layers\.3\.q_proj$",
        r"(?!.*lm_head).*proj",
        "|".join(f"model.layers.{i}.q_proj" for i in range(3_000)),
        "up",
    ],
)
def test_ordinary_expressions_are_left_to_re(pattern: str) -> None:
    assert _ways(pattern) <= MAX_WAYS
    assert isinstance(compiled(pattern)._expression, re.Pattern)


@pytest.mark.parametrize("pattern", EXPRESSIONS)
@pytest.mark.parametrize("name", ["a" * 60 + "!", "model.layers.11.self_attn.q_proj", "lalaylalay" * 20])
def test_hostile_expressions_come_to_an_end(pattern: str, name: str) -> None:
    """Each gives an answer or is refused with a reason, for any number of names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, about sets in sets
        try:
            expression = BoundedPattern(pattern)
            for _ in range(200):
                expression.fullmatch(name)
        except PeftValueError as error:
            assert repr(pattern)[1:20] in str(error) and len(str(error)) < 600
            assert re.search("not a valid regular expression|Give a list of names", str(error))


def test_one_that_takes_too_long_says_so() -> None:
    expression = BoundedPattern(r"(?:l|l|l|l)(?:a|a|a|a)(?:y|y|y|y)" * 8)
    with pytest.raises(PeftValueError, match="takes too long, the last was 'lay.*too many ways.*list of names"):
        for _ in range(100):
            expression.fullmatch("lay" * 8 + "!")


def test_many_expressions_are_refused() -> None:
    assert pattern_lookup({f"^x{i}$": i for i in range(10_000)})("x77", 0) == 77
    with pytest.raises(PeftValueError, match="10,001 regular expressions.*plain names"):
        pattern_lookup({f"^x{i}$": i for i in range(10_001)})
    assert pattern_lookup({f"x{i}": i for i in range(20_000)})("a.x77", 0) == 77


def test_a_long_expression_is_refused() -> None:
    with pytest.raises(PeftValueError, match="200,000 characters.*list of names"):
        compiled("a" * 200_000)
