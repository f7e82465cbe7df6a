# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Each mistake of `support/user_mistakes.py` is answered once, in words that help, and leaves no trace."""

import warnings
from collections import Counter
from pathlib import Path

import pytest
from support.helpers import files_below, snapshot
from support.user_mistakes import MISTAKES, WARNING, Mistake

from peft.utils.warning import PeftWarning


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_answered_once(mistake: Mistake, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model, make = mistake.prepare(tmp_path)
    before = None if model is None else snapshot(model)
    files = files_below(tmp_path)
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make()
        except Exception as raised:  # of which class it must be is looked at below
            error = raised
    given = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    answers = [str(warning.message) for warning in given] + ([] if error is None else [str(error)])
    assert len(answers) == 1, answers or "silence"
    if mistake.answer == WARNING:
        assert error is None and issubclass(given[0].category, PeftWarning), repr(error)
        assert Path(given[0].filename).name == "user_mistakes.py", f"{given[0].filename}:{given[0].lineno}"
    else:
        assert isinstance(error, mistake.answer), repr(error)
        assert model is None or snapshot(model) == before
    assert files_below(tmp_path) == files
    assert [word for word in mistake.words if word not in answers[0]] == [], answers[0]


def test_the_corpus() -> None:
    names = Counter(mistake.name for mistake in MISTAKES)
    assert len(names) >= 40 and max(names.values()) == 1
    assert all(mistake.words for mistake in MISTAKES)
