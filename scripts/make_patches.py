# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Write the commits of the tying series as a mailbox of patches with a cover letter, ready to be offered for review.

The series are the commits in the history of HEAD whose subject starts with `[tying N/M] `. They need not stand next to
each other. Afterwards `git am dist/patches/*-tying-*.patch` applies them in order.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
COVER = ROOT / "docs" / "source" / "developer_guides" / "tying_series_cover.md"
SUBJECT = re.compile(r"\[tying (\d+)/(\d+)\] (.+)")

# Where git would put a commit's date in the line that separates mails, it writes this date instead; so do we.
MAIL_SEPARATOR = "From {commit} Mon Sep 17 00:00:00 2001"


class SeriesError(Exception):
    """There is no series that could be written, for the reason given."""


@dataclass(frozen=True)
class Part:
    """One commit of the series."""

    commit: str
    number: int
    total: int
    subject: str


def git(*args: str) -> str:
    """Output of a git command in the current folder."""
    result = subprocess.run(["git", *args], capture_output=True, text=True)
    if result.returncode:
        raise SeriesError(f"git {args[0]} failed: {result.stderr.strip()}")
    return result.stdout


def find_series() -> list[Part]:
    """Parts of the series, oldest first."""
    parts = []
    for line in git("log", "--reverse", "--topo-order", "--no-merges", "--format=%H %s").splitlines():
        commit, _, subject = line.partition(" ")
        if match := SUBJECT.fullmatch(subject):
            parts.append(Part(commit, int(match[1]), int(match[2]), subject))
    return parts


def check_series(parts: list[Part]) -> None:
    """Raise `SeriesError` unless the numbers run 1, 2, ... M, in the order of the history."""
    if not parts:
        raise SeriesError("no commit in the history of HEAD has a subject of the form '[tying N/M] ...'")
    found = [(part.number, part.total) for part in parts]
    wanted = [(number, len(parts)) for number in range(1, len(parts) + 1)]
    if found != wanted:
        numbers = ", ".join(f"{number}/{total}" for number, total in found)
        raise SeriesError(f"the parts must run 1/M, 2/M, ... M/M in the order of the history, found {numbers}")


def write_part(part: Part, folder: Path) -> Path:
    """Write one commit as a patch file, subject unchanged."""
    options = ["-1", "--keep-subject", f"--start-number={part.number}", f"--output-directory={folder}"]
    return Path(git("format-patch", *options, part.commit).strip())


def cover_letter(parts: list[Part], text: str) -> str:
    """The cover letter as a mail: the heading of `text` is the subject, then its body, the parts, what they change."""
    heading, _, body = text.partition("\n")
    last = parts[-1]
    author, date = git("log", "-1", "--format=%an <%ae>%n%aD", last.commit).splitlines()
    commits = "\n".join(f"  {part.subject}" for part in parts)
    changes = "\n".join(f"{part.subject}\n{git('show', '--format=', '--stat', part.commit)}" for part in parts)
    return f"""{MAIL_SEPARATOR.format(commit=last.commit)}
From: {author}
Date: {date}
Subject: [tying 0/{last.total}] {heading.lstrip("# ")}
MIME-Version: 1.0
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit

{body.strip()}

The series:

{commits}

{changes}"""


def write_series(folder: Path, cover: Path) -> list[Path]:
    """Write the cover letter and all patches into `folder`, in place of what an earlier run left there."""
    parts = find_series()
    check_series(parts)
    letter = cover_letter(parts, cover.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.patch"):
        old.unlink()
    first = folder / "0000-cover-letter.patch"
    first.write_text(letter, encoding="utf-8")
    return [first, *(write_part(part, folder) for part in parts)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("dist") / "patches", help="folder for the patches")
    parser.add_argument("--cover", type=Path, default=COVER, help="text of the cover letter, Markdown")
    args = parser.parse_args(argv)
    try:
        files = write_series(args.output.absolute(), args.cover)
    except SeriesError as error:
        print(f"make_patches: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(file) for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
