# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The page on troubleshooting has an entry for everything that the package can say, and no other entries."""

import re
from pathlib import Path

import pytest
from support.scripts import load_script


SCRIPT = load_script(Path(__file__).parents[2] / "scripts" / "list_messages.py")
PAGE = "docs/source/developer_guides/troubleshooting.md"


def test_every_message_has_an_entry():
    missing = SCRIPT.missing()
    listed = "\n".join(map(str, missing))
    assert not missing, (
        f"{len(missing)} messages have no entry in {PAGE}:\n{listed}\n"
        "Add a row to the table of their subject: a part of the message that does not vary, in backticks, and what to "
        "do. `python scripts/list_messages.py --missing` lists them again"
    )


def test_every_entry_belongs_to_a_message():
    messages = SCRIPT.messages()
    stale = [entry for entry in SCRIPT.entries() if not any(SCRIPT.covers(entry, message) for message in messages)]
    assert not stale, f"no message of the package is like these entries of {PAGE}; correct or remove them: {stale}"


def test_every_entry_stands_there_once_and_says_what_to_do():
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", SCRIPT.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [entry for entry, _ in rows] == SCRIPT.entries()
    assert len({entry for entry, _ in rows}) == len(rows)
    assert all(len(remedy) > 10 for _, remedy in rows)


def test_messages_are_found_however_they_are_written(monkeypatch, tmp_path):
    (tmp_path / "code.py").write_text(
        """
class PeftError(Exception): pass
class OddError(PeftError, ValueError): pass
class Unrelated(Exception): pass
def check(name, warn):
    if name == 1:
        raise OddError("a plain text of an error")
    if name == 2:
        raise PeftError(f"name {name!r} cannot " "be had")
    if name == 3:
        warn("either this or " + name if name else "another thing altogether")
    if name == 4:
        raise OddError(describe_loss(name))
    if name == 5:
        text = "a text with a name of its own"
        raise PeftError(text)
    if name == 6:
        raise PeftError(TEXT.format(name))
    raise Unrelated("this is nobody's business")
def describe_loss(name):
    text = f"a part about {name}"
    return f"{text}, and the remedy for it"
TEXT = "a text with {} of the file"
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(SCRIPT, "PACKAGE", tmp_path)
    monkeypatch.setattr(SCRIPT, "ROOT", tmp_path)
    found = SCRIPT.messages()
    assert [message.text for message in found] == [
        "a plain text of an error",
        "name ... cannot be had",
        "another thing altogether",
        "either this or ...",
        "a text with a name of its own",
        "a part about ...",
        "..., and the remedy for it",
        "a text with ... of the file",
    ]
    assert found[0].file == "code.py" and found[0].line == 7


@pytest.mark.parametrize(
    ("entry", "covered"),
    [("cannot be had", True), ("name ... cannot", True), ("name ... be had", True), ("cannot be given", False)],
)
def test_an_entry_covers_what_it_is_a_part_of(entry, covered):
    assert SCRIPT.covers(entry, SCRIPT.Message("name ... cannot be had", "code.py", 1)) is covered
