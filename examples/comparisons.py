# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What examples have in common that train many adapters on one task: arguments, and a file of the results."""

import argparse
import csv
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def parser_for(name: str, description: str, quick: str) -> argparse.ArgumentParser:
    """
    Make a parser, to which an example adds what only it has.

    Args:
        name: of the example, and of its folder below `outputs`.
        description: what it shows.
        quick: what `--quick` does.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--steps", type=int, help="batches that an adapter is trained on")
    parser.add_argument("--seeds", type=int, help="how often it is trained")
    parser.add_argument("--output", type=Path, default=Path("outputs") / name)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Read arguments, fill in what they leave open, and make the output folder; one thread from now on, no warnings.

    Args:
        parser: what `parser_for` gave.
        argv: arguments without the program's name; those of the process if left out.
    """
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (10 if arguments.quick else 100)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def write_csv(results: Sequence[Any], path: Path, without: Collection[str] = ()) -> None:
    """
    Write results to a file, a line each.

    Args:
        results: objects of one dataclass, at least one.
        path: the file.
        without: names of fields to leave out.
    """
    fields = [name for name in asdict(results[0]) if name not in without]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(asdict, results))
