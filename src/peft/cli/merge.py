# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft merge`: an adapter into the files of a base model, one weight at a time."""

import argparse
from typing import Any

from ._output import facts, size


HELP = "merge an adapter into the files of a base model, one weight at a time, without loading the model"
EXAMPLES = """\
  peft merge ./llama-70b ./my-adapter ./merged
  peft merge ./llama-70b ./my-adapter ./merged --no-progress --json

Killed or interrupted, the same command goes on after the last file that was finished.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", metavar="BASE", help="folder of a transformers model in safetensors files")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter")
    parser.add_argument("out", metavar="OUT", help="new or empty folder, or that of a merge that did not end")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Merge; see `_file_merge`."""
    from ._file_merge import merge_files

    return 0, merge_files(arguments.base, arguments.adapter, arguments.out, progressbar=not arguments.no_progress)


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people."""
    return facts(
        {
            "written to": result["out"],
            "files": f"{len(result['files'])} ({size(result['bytes'])})",
            "finished before": result["finished_before"] or None,
            "computed tensors": result["computed"],
            "added tensors": result["added"] or None,
            "not in the model": result["left_out"] or None,
            "no longer tied": result["untied"] or None,
        }
    )
