# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Measure training and generation with adapters on a GPU: the base model, this package in both ways, others beside it.

    python benchmarks/gpu/run.py [--only REGEX] [--ways base,hand,fused,ladder] [--released FOLDER] [--shape NAME]
                                 [--device DEVICE] [--json FILE] [--plot FILE] [--list]

All ways of a row are measured in turn in one process; README.md beside this file says more.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from report import as_table, plot


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAYS = ("base", "hand", "fused", "ladder")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure adapters on a GPU, each way as a ratio to the base model.")
    parser.add_argument("--only", metavar="REGEX", default="", help="run the rows whose names match")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument(
        "--released", type=Path, metavar="FOLDER", help="folder that holds the released package, peft/"
    )
    parser.add_argument("--shape", default="1b", help="shape of the model: 1b, or tiny to try the program out")
    parser.add_argument("--layers", type=int, help="layers of the model, instead of the shape's own number")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program out")
    parser.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "outputs" / "gpu.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=ROOT / "outputs" / "gpu.png")
    parser.add_argument("--list", action="store_true", help="list the rows and do nothing else")
    return parser.parse_args()


def measure(package: Path, ways: str, arguments: argparse.Namespace) -> dict:
    """
    Measure rows in a process of their own; what it prints beside its figures is shown.

    Args:
        package: folder that the package is imported from.
        ways: which ways, separated by commas.
        arguments: the command line.
    """
    command = [sys.executable, str(HERE / "worker.py"), "--ways", ways, "--only", arguments.only]
    command += ["--shape", arguments.shape, "--device", arguments.device, "--layers", str(arguments.layers or 0)]
    env = {**os.environ, "PYTHONPATH": str(package)}
    env.pop("PEFT_DISABLE_FUSED", None)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        found: dict = {"rows": {}}
        for line in process.stdout:
            kind, _, content = line.partition(" ")
            if kind == "MACHINE":
                found["machine"] = json.loads(content)
            elif kind == "ROW":
                row = json.loads(content)
                found["rows"][row.pop("row")] = row
                print(f"{ways}: {content.strip()[:160]}", file=sys.stderr, flush=True)
    if process.returncode:
        print(f"the worker for {ways} has ended with {process.returncode}", file=sys.stderr)
    return found


def main() -> int:
    """Run what the command line asks for, and write the report."""
    arguments = parse_arguments()
    if arguments.list:
        from rows import ROWS

        print("\n".join(name for name in ROWS if re.search(arguments.only, name)))
        return 0
    results = measure(ROOT / "src", arguments.ways, arguments)
    if arguments.released:
        released = measure(arguments.released.resolve(), "base,released", arguments)
        for name, row in released["rows"].items():
            # ratios are to the base model of the same process
            results["rows"].setdefault(name, {})["released"] = {
                **row.get("released", {}),
                "base_ms": row.get("base", {}).get("ms"),
            }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1))
    print(as_table(results))
    plot(results, arguments.plot)
    return int(not results["rows"])


if __name__ == "__main__":
    sys.exit(main())
