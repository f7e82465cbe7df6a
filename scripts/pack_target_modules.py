#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Write the table of default target modules from a folder of compatibility facts.

usage: pack_target_modules.py COMPAT_DIR [OUT]

The facts (`enums.json`) list one mapping of model type to module names per method; most of them are equal or nearly
so. A mapping that stands alone is written in full under "tables"; one that resembles another is written under "like",
as the name of that other mapping and the entries to set on top of it (null removes an entry).
"""

import argparse
import json
from pathlib import Path


OUT = Path(__file__).parents[1] / "src/peft/utils/data/target_modules.json"
# The one that most of the others resemble, hence the first.
LORA_TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


def changes_between(table: dict, model: dict) -> dict:
    """Return the entries that turn `model` into `table`."""
    changed = {key: value for key, value in table.items() if model.get(key) != value}
    return {**changed, **{key: None for key in model if key not in table}}


def pack(mappings: dict[str, dict]) -> dict:
    """Split the mappings into full tables and those that are like one of them."""
    names = sorted(mappings, key=lambda name: (name != LORA_TABLE, name))
    tables, like = {}, {}
    for name in names:
        table = mappings[name]
        changes = {other: changes_between(table, tables[other]) for other in tables}
        nearest = min(changes, key=lambda other: len(changes[other]), default=None)
        if nearest is not None and 2 * len(changes[nearest]) < len(table):
            like[name] = [nearest, changes[nearest]]
        else:
            tables[name] = table
    return {"tables": tables, "like": like}


def to_text(packed: dict) -> str:
    """Return JSON with one entry per line, so that a changed fact is a changed line."""
    lines = ['{"tables": {']
    for name, table in packed["tables"].items():
        lines.append(f'  "{name}": {{')
        lines += [f"    {json.dumps(key)}: {json.dumps(value)}," for key, value in table.items()]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  },")
    lines[-1] = "  }"
    lines.append('}, "like": {')
    lines += [f"  {json.dumps(name)}: {json.dumps(entry)}," for name, entry in packed["like"].items()]
    lines[-1] = lines[-1].removesuffix(",")
    lines.append("}}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the facts, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compat", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    args = parser.parse_args()
    facts = json.loads((args.compat / "enums.json").read_text())["target_module_mappings"]
    mappings = {name: table for name, table in facts.items() if name.startswith("TRANSFORMERS_MODELS_TO_")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_text(pack(mappings)))


if __name__ == "__main__":
    main()
