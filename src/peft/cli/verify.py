# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft verify`: whether a saved adapter is whole, and fits a base model."""

import argparse
from typing import TYPE_CHECKING, Any

from ._output import facts, table


if TYPE_CHECKING:
    from torch import nn

    from ._tensor_files import TensorFile


HELP = "check a saved adapter: hashes, entries that are not finite, ties; with --base also names and shapes"
EXAMPLES = """\
  peft verify ./my-adapter
  peft verify ./my-adapter --base ./llama-70b
  peft verify ./my-adapter --base ./llama-70b/config.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter")
    parser.add_argument("--base", metavar="MODEL", help="folder of the base model, or its config.json")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Check the file, then what it says about the base model."""
    from ..anatomy.skeletons import build_skeleton
    from ..checkpoints.hashes import hashes_from_header
    from ._adapter_config import read_adapter_config
    from ._tensor_files import open_adapter

    config = read_adapter_config(arguments.adapter)
    file = open_adapter(arguments.adapter)
    hashes = hashes_from_header(file.metadata)
    problems = _check_values(file, hashes)
    checked = ["finite"] + (["hashes"] if hashes is not None else [])
    if arguments.base is not None:
        problems += _check_fit(file, build_skeleton(arguments.base, config), config)
        checked += ["names", "shapes", "ties"]
    return int(bool(problems)), {
        "tensors": len(file.entries),
        "checked": checked,
        "hashes": "none in the file" if hashes is None else len(hashes),
        "problems": [{"tensor": key, "problem": problem} for key, problem in problems],
    }


def _check_values(file: "TensorFile", hashes: dict[str, str] | None) -> list[tuple[str, str]]:
    """Read each tensor once: is it the one that was saved, and are its entries finite?"""
    from ..checkpoints.hashes import hash_of

    problems = []
    for key in file.entries:
        tensor = file.read(key)
        if hashes is not None and key not in hashes:
            problems.append((key, "has no hash, although others have; it was added after saving"))
        elif hashes is not None and hash_of(tensor) != hashes[key]:
            problems.append((key, "is not what was saved: its hash differs"))
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            count = int((~tensor.float().isfinite()).sum())
            problems.append((key, f"{count:,d} of its {tensor.numel():,d} entries are not finite"))
    for key in sorted(set(hashes or ()) - set(file.entries)):
        problems.append((key, "has a hash, but is not in the file any more"))
    return problems


def _check_fit(file: "TensorFile", skeleton: "nn.Module", config: Any) -> list[tuple[str, str]]:
    """Compare names, shapes and ties with those of an adapter that is made for the base model."""
    from ..anatomy.walking import adapter_modules
    from ..checkpoints.aliases import restore_aliases
    from ..checkpoints.assignment import live_tensors
    from ..checkpoints.keys import Place, adapter_key_map, bias_key_map, embedding_tensors, read_forms
    from ..checkpoints.state_dict import under_new_names
    from ..mapping_func import get_peft_model

    model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    # what the file holds, and which of its keys a tensor that is written once stands for
    found = restore_aliases({key: file.meta(key) for key in file.entries}, file.metadata)
    for _, module in adapter_modules(model):
        module.prepare_to_load("default", found)
    keys = adapter_key_map(model, "default")
    keys.update(bias_key_map(model, "default", getattr(config, "bias", "none")))
    optional = {key: Place(key) for key in embedding_tensors(model) if key not in keys}
    keys.update(optional)
    content = read_forms(model, "default", under_new_names(model, found, "default", keys))
    live = live_tensors(model, {place.key for place in keys.values()})
    problems = [(key, "belongs to nothing in the base model") for key in content if key not in keys]
    # what stands under several keys, because modules are tied, has to be there under one of them
    present = {keys[key].key for key in content if key in keys}
    needed = {place.key: key for key, place in reversed(keys.items()) if key not in optional}
    problems += [(key, "is missing") for place, key in needed.items() if place not in present]
    first: dict[int, str] = {}
    for key, place in keys.items():
        if key not in content:
            continue
        expected = place.read(live[place.key]).shape
        if content[key].shape != expected:
            problems.append((key, f"has shape {_x(content[key].shape)}, the model's is {_x(expected)}"))
            continue
        owner = first.setdefault(id(live[place.key]), key)
        if owner != key and key in file.entries and owner in file.entries:
            one, other = keys[owner].read(file.read(owner)), place.read(file.read(key))
            if one.shape != other.shape or not bool((one == other).all()):
                problems.append((key, f"differs from {owner}, although the two are tied in the model"))
    return problems


def _x(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people."""
    head = facts(
        {
            "tensors": result["tensors"],
            "checked": result["checked"],
            "hashes": result["hashes"],
            "problems": len(result["problems"]),
        }
    )
    if not result["problems"]:
        return head
    rows = [(found["tensor"], found["problem"]) for found in result["problems"]]
    return f"{head}\n\n{table(('tensor', 'problem'), rows)}"
