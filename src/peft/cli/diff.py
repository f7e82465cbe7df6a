# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft diff`: in what two saved adapters differ."""

import argparse
from typing import Any

from ._output import facts, table


HELP = "say in what two saved adapters differ: settings, tensors, values"
EXAMPLES = """\
  peft diff ./checkpoint-100 ./checkpoint-200
  peft diff ./before ./after --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", metavar="A", help="folder of an adapter")
    parser.add_argument("b", metavar="B", help="folder of another one")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Compare configs field by field, and tensors one pair at a time."""
    from ._adapter_config import read_adapter_config
    from ._tensor_files import open_adapter
    from .inspect import settings

    configs = [settings(read_adapter_config(folder)) for folder in (arguments.a, arguments.b)]
    methods = [read_adapter_config(folder).peft_type for folder in (arguments.a, arguments.b)]
    for fields, method in zip(configs, methods, strict=True):
        fields["peft_type"] = str(getattr(method, "value", method))
    names = sorted(set(configs[0]) | set(configs[1]))
    fields = {
        name: [config.get(name, "(default)") for config in configs]
        for name in names
        if name not in configs[0] or name not in configs[1] or configs[0][name] != configs[1][name]
    }
    a, b = open_adapter(arguments.a), open_adapter(arguments.b)
    common = [key for key in a.entries if key in b.entries]
    reshaped = {
        key: [_form(a.entries[key]), _form(b.entries[key])]
        for key in common
        if _form(a.entries[key]) != _form(b.entries[key])
    }
    changed = {}
    for key in common:
        if a.entries[key].shape == b.entries[key].shape:
            difference = _difference(a.read(key), b.read(key))
            if difference is not None:
                changed[key] = difference
    result = {
        "settings": fields,
        "only_in_a": [key for key in a.entries if key not in b.entries],
        "only_in_b": [key for key in b.entries if key not in a.entries],
        "other_form": reshaped,
        "changed": changed,
        "equal": len(common) - len(changed.keys() | reshaped.keys()),
    }
    differs = any(result[name] for name in ("settings", "only_in_a", "only_in_b", "other_form", "changed"))
    return int(differs), result


def _form(entry: Any) -> str:
    return f"{'x'.join(map(str, entry.shape))} {entry.dtype}"


def _difference(a: Any, b: Any) -> dict[str, float] | None:
    """Measure how far apart two tensors of one shape are; None if they are equal."""
    import torch

    a, b = a.double(), b.double()
    if torch.equal(a, b):
        return None
    gap = b - a
    return {
        "largest": float(gap.abs().max()),
        "relative": float(gap.norm() / a.norm()) if a.norm() > 0 else float("inf"),
        "entries": float((gap != 0).double().mean()),
    }


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people."""
    head = {
        "equal tensors": result["equal"],
        "changed tensors": len(result["changed"]),
        "only in A": result["only_in_a"] or None,
        "only in B": result["only_in_b"] or None,
    }
    parts = [facts(head)]
    if result["settings"]:
        rows = [(name, str(a), str(b)) for name, (a, b) in result["settings"].items()]
        parts.append(table(("setting", "A", "B"), rows))
    if result["other_form"]:
        parts.append(table(("tensor", "A", "B"), [(key, *forms) for key, forms in result["other_form"].items()]))
    if result["changed"]:
        rows = [(key, d["largest"], d["relative"], d["entries"]) for key, d in result["changed"].items()]
        parts.append(table(("changed tensor", "largest change", "|B-A|/|A|", "share of entries"), rows))
    return "\n\n".join(parts)
