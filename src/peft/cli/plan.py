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
    """Plan the adapter for a model without weights, and carry the plan out to measure it."""
    from ..anatomy.skeletons import build_skeleton
    from ..checkpoints.state_dict import collect_tensors
    from ..mapping_func import get_peft_model
    from ..planning import plan_adapter
    from ..tying.report import weight_tying_report
    from ._adapter_config import read_adapter_config

    config = read_adapter_config(arguments.config)
    config.inference_mode = False
    skeleton = build_skeleton(arguments.model, config)
    plan = None if config.is_prompt_learning else plan_adapter(skeleton, config)
    # numbers and sizes of tensors are known to the layers alone
    model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    trainable, total = model.get_nb_trainable_parameters()
    tensors = collect_tensors(model, None, "default", save_embedding_layers="auto")
    report = weight_tying_report(model)
    return 0, {
        "model": type(skeleton).__name__,
        "method": str(getattr(config.peft_type, "value", config.peft_type)),
        "targets": list(plan.module_names) if plan else [],
        "target_parameters": list(plan.parameters) if plan else [],
        "modules_to_save": sorted(getattr(config, "modules_to_save", None) or []),
        "near_misses": {entry: list(near) for entry, near in plan.near_misses.items()} if plan else {},
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
