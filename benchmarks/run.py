# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Compare this package with the released one, side by side.

    python benchmarks/run.py [--only REGEX] [--rounds N] [--device DEVICE] [--released PYTHON]
                             [--json FILE] [--plot FILE] [--list]

Both are measured in turn, each in a process of its own with one thread; README.md beside this file says more.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

from case import OURS, RELEASED, Case
from cases import CASES
from environment import RELEASED_VERSION, ROOT, machine, released_python
from harness import Workers, run_cases
from plot import plot
from report import NOT_MEASURED, as_data, as_table, make_lines


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare this package with the released one, side by side.")
    parser.add_argument("--only", metavar="REGEX", default="", help="run the cases whose names match")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every case, instead of its own number")
    parser.add_argument("--device", default="cpu", help="where tensors are, such as cuda (default: cpu)")
    parser.add_argument(
        "--released",
        type=Path,
        metavar="PYTHON",
        help=f"interpreter that has peft {RELEASED_VERSION}; left out, an environment is made for it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "outputs" / "benchmarks.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=ROOT / "outputs" / "benchmarks.png")
    parser.add_argument("--list", action="store_true", help="list the cases and do nothing else")
    return parser.parse_args()


def chosen_cases(pattern: str) -> list[Case]:
    """Give the cases whose names match a regular expression; end the program if there are none."""
    cases = [case for name, case in CASES.items() if re.search(pattern, name)]
    if not cases:
        raise SystemExit(f"no case matches {pattern!r}; there are {', '.join(CASES)}")
    return cases


def check_versions(versions: dict[str, dict[str, str]]) -> None:
    """End the program if the two packages are not the ones to compare, or what they run on differs."""
    if versions[RELEASED]["peft"] != RELEASED_VERSION or versions[OURS]["peft"] == RELEASED_VERSION:
        raise SystemExit(f"these are not this package and release {RELEASED_VERSION}: {versions}")
    if any(versions[OURS][name] != versions[RELEASED][name] for name in ("python", "torch", "transformers")):
        raise SystemExit(f"the two packages must run on the same versions of everything else: {versions}")


def main() -> int:
    """Measure, and report; the exit status says whether everything could be measured."""
    arguments = parse_arguments()
    cases = chosen_cases(arguments.only)
    if arguments.list:
        print("\n".join(f"{case.name}: {(case.start.__doc__ or '').strip()}" for case in cases))
        return 0
    start = time.perf_counter()
    pythons = {OURS: Path(sys.executable), RELEASED: arguments.released or released_python()}
    os.environ["PEFT_BENCHMARK_DEVICE"] = arguments.device
    before = machine()
    with Workers(pythons) as workers:
        versions = {package: workers.of(package).versions for package in pythons}
        check_versions(versions)
        samples = run_cases(cases, workers, arguments.rounds)
    lines = make_lines(cases, samples)
    print(
        f"{before['processor']}, {before['cores']} cores, load {before['load']} before and {machine()['load']} after;"
    )
    print(", ".join(f"{name} {version}" for name, version in versions[OURS].items() if name != "peft"), end="; ")
    print(f"peft {versions[OURS]['peft']} against {versions[RELEASED]['peft']}; {time.perf_counter() - start:.0f} s\n")
    print(as_table(lines))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(as_data(lines, samples, versions, before), indent=1) + "\n")
    plot(lines, arguments.plot)
    print(f"\nwritten: {arguments.json}, {arguments.plot}")
    return int(any(line.verdict == NOT_MEASURED for line in lines))


if __name__ == "__main__":
    sys.exit(main())
