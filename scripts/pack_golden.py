#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Repack the golden checkpoints of a folder of compatibility facts into `tests/golden`.

usage: pack_golden.py COMPAT_DIR [OUT]

A compat folder holds each golden case as a folder of small files, which wastes space and gives a commit thousands of
entries. Here all facts go into one `facts.json.gz`, and all tensors of a base model, with those of the cases on it,
into one `tensors/BASE.safetensors.gz`, under keys OWNER/KIND/KEY (see `tests/golden/README.md`). Most of what
compression saves are names. The same facts give the same bytes on every run.
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save


OUT = Path(__file__).parents[1] / "tests/golden"

# What the reader compares. Left out: notes on how the facts were taken (sizes of differences, lists of files).
CASE_FACTS = (
    "atol", "base", "config_class", "config_kwargs", "disabled", "forward_kwargs", "grad_norms", "init_identity",
    "merge_adapter", "merged", "merged_keys_equal_base", "merged_may_equal_adapter", "merged_plain_forward",
    "model_class", "peft_type", "requires", "save_kwargs", "save_kwargs_sd", "set_state_dict_output_equal",
    "state_dict_keys", "state_dict_keys_loaded", "targeted_modules", "train", "unload", "unload_keys_equal_base",
)  # fmt: skip
SCRIPT_FACTS = ("atol", "base", "dropped_because_random", "requires", "steps", "values")
# Further outputs that are not compared: with another seed the release itself is beyond the tolerance (randomised SVD).
RANDOM = {"pissa_niter_16": ["gram.AAt", "gram.BtB"]}


def read_json(path: Path) -> dict:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved adapter."""
    file = folder / "adapter_model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under keys that start with `prefix`."""
    return {f"{prefix}/{key}": tensor for key, tensor in tensors.items()}


def expected_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the expected outputs of all cases in a folder, keys NAME/expected/OUTPUT."""
    file = folder / "_expected.safetensors"
    stored = load_file(file) if file.exists() else {}
    return {"{}/expected/{}".format(*key.split("/", 1)): tensor for key, tensor in stored.items()}


def pack_base(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the description of a base model and its weights, inputs and output."""
    tensors = prefixed("base/weights", load_file(folder / "model.safetensors"))
    for key, tensor in load_file(folder / "io.safetensors").items():
        name = f"base/inputs/{key.removeprefix('in.')}" if key.startswith("in.") else f"base/output/{key}"
        tensors[name] = tensor
    return read_json(folder / "spec.json"), tensors


def pack_cases(folder: Path) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Return the facts of all cases on one base model, and their tensors."""
    facts, tensors = {}, expected_tensors(folder)
    for name, observed in read_json(folder / "_facts.json").items():
        kept = {key: observed[key] for key in CASE_FACTS if observed.get(key) is not None}
        facts[f"{folder.name}/{name}"] = kept | {"adapter_config": read_json(folder / name / "adapter_config.json")}
        tensors |= prefixed(f"{name}/adapter", read_weights(folder / name))
    return facts, tensors


def pack_scripts(folder: Path) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Return the scripts of calls in a folder, with the adapters that they load, and all tensors."""
    facts, tensors = {}, expected_tensors(folder)
    for name, script in read_json(folder / "_facts.json").items():
        kept = {key: script[key] for key in SCRIPT_FACTS if script.get(key) is not None}
        if name in RANDOM:
            kept["dropped_because_random"] = kept.get("dropped_because_random", []) + RANDOM[name]
        adapters = sorted(path.parent for path in (folder / name).glob("*/adapter_config.json"))
        configs = {adapter.name: read_json(adapter / "adapter_config.json") for adapter in adapters}
        facts[f"{folder.name}/{name}"] = kept | {"adapters": configs}
        for adapter in adapters:
            tensors |= prefixed(f"{name}/{adapter.name}", read_weights(adapter))
    return facts, tensors


def write_gzip(path: Path, content: bytes) -> None:
    """Write a gzip file without a time stamp or a file name in it, so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors as a compressed safetensors file."""
    write_gzip(path, save({key: tensors[key].contiguous() for key in sorted(tensors)}))


def main() -> None:
    """Read the compat folder, write the packed files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compat", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    args = parser.parse_args()
    checkpoints = args.compat / "checkpoints"
    facts = {"bases": {}, "cases": {}, "scripts": {}}
    for folder in sorted((checkpoints / "bases").iterdir()):
        facts["bases"][folder.name], tensors = pack_base(folder)
        if (checkpoints / "cases" / folder.name).is_dir():
            cases, more = pack_cases(checkpoints / "cases" / folder.name)
            facts["cases"] |= cases
            tensors |= more
        write_tensors(args.out / "tensors" / f"{folder.name}.safetensors.gz", tensors)
    for kind in ("ops", "init"):
        scripts, tensors = pack_scripts(checkpoints / kind)
        facts["scripts"] |= scripts
        write_tensors(args.out / "tensors" / f"{kind}.safetensors.gz", tensors)
    write_gzip(args.out / "facts.json.gz", json.dumps(facts, separators=(",", ":"), sort_keys=True).encode())


if __name__ == "__main__":
    main()
