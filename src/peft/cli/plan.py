# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft plan`: what an adapter would do to a model, without the model's weights."""

import argparse
from typing import Any

from ._output import facts, size, table


HELP = "say what an adapter would do to a model: targets, sizes, ties; nothing is loaded but two config files"
EXAMPLES = """\
  peft plan ./llama-70b ./my-adapter
  peft plan ./llama-70b/config.json adapter_config.json --names
  peft plan ./llama-70b adapter_config.json --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder of a transformers model, or its config.json")
    parser.add_argument("config", metavar="CONFIG", help="folder of an adapter, or its adapter_config.json")
    parser.add_argument("--names", action="store_true", help="list every module, not a line per kind")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Put the adapter into a model without weights, and look at the result."""
    from ..anatomy.matching import find_targets, near_names
    from ..anatomy.skeletons import build_skeleton
    from ..anatomy.walking import names_of_modules
    from ..checkpoints.state_dict import collect_tensors
    from ..mapping_func import get_peft_model
    from ..tying.report import weight_tying_report
    from ._adapter_config import read_adapter_config

    config = read_adapter_config(arguments.config)
    config.inference_mode = False
    skeleton = build_skeleton(arguments.model, config)
    names = [name for name in names_of_modules(skeleton) if name]
    model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    near = {}
    if isinstance(getattr(config, "target_modules", None), (list, tuple, set)):
        # names of experts' layers stand for parameters by now
        unmatched = find_targets(model.peft_config["default"], names).unmatched
        near = {entry: near_names(entry, names) for entry in sorted(unmatched)}
    trainable, total = model.get_nb_trainable_parameters()
    tensors = collect_tensors(model, None, "default", save_embedding_layers="auto")
    report = weight_tying_report(model)
    return 0, {
        "model": type(skeleton).__name__,
        "method": str(getattr(config.peft_type, "value", config.peft_type)),
        "targets": getattr(model.base_model, "targeted_module_names", []),
        "target_parameters": getattr(model.base_model, "targeted_parameter_names", []),
        "modules_to_save": sorted(getattr(config, "modules_to_save", None) or []),
        "near_misses": near,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "tensors": len(tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "ties": report.to_dict(),
        "_ties_table": str(report),
        "_names": arguments.names,
    }


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people."""
    targets = result["targets"] + result["target_parameters"]
    share = 100 * result["trainable_parameters"] / max(result["all_parameters"], 1)
    head = facts(
        {
            "model": result["model"],
            "method": result["method"],
            "targets": len(targets),
            "trained in full": result["modules_to_save"] or None,
            "trainable parameters": f"{result['trainable_parameters']:,d} ({share:.4f} % of all)",
            "all parameters": result["all_parameters"],
            "on disk": f"{size(result['bytes'])} in {result['tensors']:,d} tensors",
            **{f"{entry!r} matches nothing": _hint(near) for entry, near in result["near_misses"].items()},
        }
    )
    if result["_names"]:
        listed = "\n".join(targets)
    else:
        kinds: dict[str, int] = {}
        for name in targets:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            kinds[kind] = kinds.get(kind, 0) + 1
        listed = table(("targets", "modules"), kinds.items())
    return "\n\n".join(part for part in (head, listed if targets else "", result["_ties_table"]) if part)


def _hint(near: list[str]) -> str:
    return f"did you mean {', '.join(near)}?" if near else "and no name comes near"
