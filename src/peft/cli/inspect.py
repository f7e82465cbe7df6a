# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft inspect`: what is in a saved adapter."""

import argparse
import dataclasses
import re
from typing import Any

from ._output import facts, size, table


HELP = "say what is in a saved adapter: settings, modules, tensors, sizes, ties"
EXAMPLES = """\
  peft inspect ./my-adapter
  peft inspect ./my-adapter --tensors
  peft inspect ./my-adapter --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not a line per kind")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Read the config and the header of the weights; no tensor is read."""
    from ..checkpoints.aliases import aliases_from_header
    from ..checkpoints.hashes import hashes_from_header
    from ._adapter_config import read_adapter_config
    from ._tensor_files import open_adapter

    config = read_adapter_config(arguments.adapter)
    file = open_adapter(arguments.adapter)
    tensors = {
        key: {"shape": list(entry.shape), "dtype": entry.dtype, "bytes": entry.size}
        for key, entry in file.entries.items()
    }
    return 0, {
        "method": str(getattr(config.peft_type, "value", config.peft_type)),
        "base_model": config.base_model_name_or_path,
        "task": config.task_type,
        "settings": settings(config),
        "parameters": sum(entry.count for entry in file.entries.values()),
        "bytes": sum(entry.size for entry in file.entries.values()),
        "written_once": sorted(aliases_from_header(file.metadata)),
        "hashed": len(hashes_from_header(file.metadata) or {}),
        "tensors": tensors,
        "_list_tensors": arguments.tensors,
    }


def settings(config: Any) -> dict[str, Any]:
    """Give the fields of a config that differ from the defaults of its method, as plain values."""
    defaults = type(config)().to_dict() if _has_defaults(type(config)) else {}
    noted = ("base_model_name_or_path", "inference_mode", "peft_type", "task_type", "auto_mapping", "peft_version")
    return {
        name: sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        for name, value in config.to_dict().items()
        if name not in noted and (name not in defaults or defaults[name] != value)
    }


def _has_defaults(config_cls: type) -> bool:
    needed = [
        f
        for f in dataclasses.fields(config_cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if needed:
        return False
    try:
        config_cls()
    except (TypeError, ValueError):  # some methods refuse to be made without settings
        return False
    return True


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people."""
    head = facts(
        {
            "method": result["method"],
            "base model": result["base_model"],
            "task": result["task"],
            "parameters": result["parameters"],
            "on disk": f"{size(result['bytes'])} in {len(result['tensors']):,d} tensors",
            "with a hash": f"{result['hashed']} of {len(result['tensors'])} tensors",
            "tied, written once": result["written_once"] or None,
            **result["settings"],
        }
    )
    if result["_list_tensors"]:
        rows = [(key, "x".join(map(str, t["shape"])), t["dtype"], t["bytes"]) for key, t in result["tensors"].items()]
        return f"{head}\n\n{table(('tensor', 'shape', 'type', 'bytes'), rows)}"
    kinds: dict[tuple[str, str], list[int]] = {}
    for key, tensor in result["tensors"].items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", key.removeprefix("base_model.model."))
        kinds.setdefault((kind, tensor["dtype"]), []).append(tensor["bytes"])
    rows = [(kind, dtype, len(sizes), sum(sizes)) for (kind, dtype), sizes in kinds.items()]
    return f"{head}\n\n{table(('tensors', 'type', 'count', 'bytes'), rows)}"
