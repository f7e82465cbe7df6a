# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The command line: `peft plan`, `inspect`, `diff`, `verify`, `merge` and `doctor`.

Each command is a module with `HELP`, `EXAMPLES`, `add_arguments`, `run` (the work; returns exit status and plain
values) and `as_text` (those values for people). They load torch when they run, so that `--help` is there at once.
"""

import argparse
import gc
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any


COMMANDS = ("plan", "inspect", "diff", "verify", "merge", "doctor")

STATUS = """\
exit status:
  0  done, and nothing found
  1  something was found: problems (verify, doctor), differences (diff)
  2  it could not be done; the reason is on the error stream
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: arguments without the program's name; those of the process if left out.

    Returns:
        The exit status: 0 if nothing was found, 1 if something was, 2 if it could not be done.

    Raises:
        SystemExit: for arguments that are not understood (status 2) and for `--help` (0).
    """
    commands = {name: importlib.import_module(f".{name}", __name__) for name in COMMANDS}
    arguments = _parser(commands).parse_args(argv)
    command = commands[arguments.command]
    status, result, notes = _run(command, arguments)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if notes:
        result["warnings"] = notes
    if "error" in result:
        print(f"error: {result['error']}", file=sys.stderr)
    if arguments.json:
        plain = {name: value for name, value in result.items() if not name.startswith("_")}  # others are for as_text
        print(json.dumps(plain, indent=2))
    elif "error" not in result:
        print(command.as_text(result))
    return status


def _parser(commands: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft",
        description="Look at adapters, check them, and merge them, from files.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    entries = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        entry = entries.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=f"examples:\n{command.EXAMPLES}\n{STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(entry)
        entry.add_argument("--json", action="store_true", help="print plain values instead of a table")
    return parser


def _run(command: ModuleType, arguments: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    """Run a command; give exit status, result, and what the package has warned about."""
    from ..utils.error import PeftError
    from ..utils.warning import PeftWarning

    collecting = gc.isenabled()
    gc.disable()  # importing torch and transformers makes a great many objects and no garbage
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PeftWarning)
            try:
                status, result = command.run(arguments)
            except (PeftError, OSError) as error:
                status, result = 2, {"error": str(error)}
            except KeyboardInterrupt:
                status, result = 130, {"error": "interrupted"}
    finally:
        if collecting:
            gc.enable()
    ours = [caught_one for caught_one in caught if issubclass(caught_one.category, PeftWarning)]
    for other in caught:
        if other not in ours:
            warnings.showwarning(other.message, other.category, other.filename, other.lineno)
    return status, result, list(dict.fromkeys(str(warning.message) for warning in ours))
