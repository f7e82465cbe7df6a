# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Count on how many of the models in tests/support/tied_models.py a tie holds at each stage, for the installed peft.

    PYTHONPATH=tests python benchmarks/count_ties.py

One module of each tie is named, with `ensure_weight_tying=True` except where a line says "apart": in
`modules_to_save`, and trained for two steps; or in `target_modules`, with factors that start at random.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable

import torch
import transformers
from support.tied_models import TIED_MODELS, TiedModel
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model


TOLERANCE = 1e-5


def config_for(tied: TiedModel, named: str, tying: bool = True) -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules=list(tied.targets),
        modules_to_save=[named],
        ensure_weight_tying=tying,
        task_type=tied.task_type,
        fan_in_fan_out="c_attn" in tied.targets,
    )


def trained(tied: TiedModel, named: str, tying: bool = True) -> PeftModel:
    model = get_peft_model(tied.build(), config_for(tied, named, tying))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        tied.forward(model).float().pow(2).mean().backward()
        optimizer.step()
    return model


def is_tied(model: PeftModel, tied: TiedModel, adapter: str = "default") -> bool:
    """Whether one parameter, and not that of the base model, stands at all members."""
    found = []
    for member in tied.members:
        path, _, key = member.rpartition(".")
        copies = getattr(model.get_base_model().get_submodule(path), "modules_to_save", {})
        if adapter not in copies:
            return False
        found.append(copies[adapter].get_parameter(key))
    return len({id(parameter) for parameter in found}) == 1


def logits(model: nn.Module, tied: TiedModel) -> torch.Tensor:
    with torch.no_grad():
        return tied.forward(model.eval())


def after_training(tied: TiedModel, named: str) -> bool:
    return is_tied(trained(tied, named), tied)


def after_reloading(tied: TiedModel, named: str) -> bool:
    model, folder = trained(tied, named), tempfile.mkdtemp()
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(tied.build(), folder)
    return is_tied(again, tied) and torch.equal(logits(again, tied), logits(model, tied))


def second_adapter(tied: TiedModel, named: str) -> bool:
    model = trained(tied, named)
    model.add_adapter("other", config_for(tied, named))
    return is_tied(model, tied, "other")


def merged(tied: TiedModel, named: str) -> bool:
    model = trained(tied, named)
    expected = logits(model, tied)
    bare = model.merge_and_unload()
    parameters = dict(bare.named_parameters(remove_duplicate=False))
    same = torch.allclose(logits(bare, tied), expected, atol=TOLERANCE)
    return same and len({id(parameters[member]) for member in tied.members}) == 1


def reopened(tied: TiedModel, named: str, tying: bool = True) -> bool | None:
    model = trained(tied, named, tying)
    expected = logits(model, tied)
    bare = model.merge_and_unload()
    if not isinstance(bare, transformers.PreTrainedModel):
        return None
    folder = tempfile.mkdtemp()
    bare.save_pretrained(folder)
    again = type(bare).from_pretrained(folder, attn_implementation="eager")
    return torch.allclose(logits(again, tied), expected, atol=TOLERANCE)


def unloaded(tied: TiedModel, named: str) -> bool:
    return torch.equal(logits(trained(tied, named).unload(), tied), logits(tied.build(), tied))


def targeted(tied: TiedModel, named: str, tying: bool = True) -> PeftModel:
    config = config_for(tied, named, tying)
    config.target_modules = {*tied.targets, named}
    config.modules_to_save = None
    config.init_lora_weights = False
    return get_peft_model(tied.build(), config)


def targets_copied(tied: TiedModel, named: str) -> bool:
    model = targeted(tied, named)
    return torch.equal(logits(copy.deepcopy(model), tied), logits(model, tied))


def targets_counted_once(tied: TiedModel, named: str) -> bool:
    """Whether the factors of the group are two parameters, as those of one module are."""
    alone = sum(p.requires_grad for p in get_peft_model(tied.build(), targets_only(tied)).parameters())
    return sum(p.requires_grad for p in targeted(tied, named).parameters()) == alone + 2


def targets_only(tied: TiedModel) -> LoraConfig:
    config = config_for(tied, "")
    config.modules_to_save, config.ensure_weight_tying = None, False
    return config


def targets_reloaded(tied: TiedModel, named: str) -> bool:
    model, folder = targeted(tied, named), tempfile.mkdtemp()
    model.save_pretrained(folder)
    return torch.equal(logits(PeftModel.from_pretrained(tied.build(), folder), tied), logits(model, tied))


def targets_merged(tied: TiedModel, named: str, tying: bool = True) -> bool:
    model = targeted(tied, named, tying)
    expected = logits(model, tied)
    return torch.allclose(logits(model.merge_and_unload(), tied), expected, rtol=1e-4, atol=1e-4)


STAGES: dict[str, Callable[[TiedModel, str], bool | None]] = {
    "one parameter after training": after_training,
    "one parameter and the same logits after reloading": after_reloading,
    "second adapter tied": second_adapter,
    "merged: one parameter, same logits": merged,
    "merged, reopened with transformers: same logits": reopened,
    "adapted apart, merged, reopened: same logits": lambda tied, named: reopened(tied, named, tying=False),
    "unloaded: logits of the base model": unloaded,
    "target: two trained factors for the group": targets_counted_once,
    "target: the same logits after reloading": targets_reloaded,
    "target: merged, same logits": targets_merged,
    "target: deepcopy, same logits": targets_copied,
    "target adapted apart: merged, same logits": lambda tied, named: targets_merged(tied, named, tying=False),
}


def attempt(stage: Callable[[TiedModel, str], bool | None], tied: TiedModel, named: str) -> bool | None:
    try:
        return stage(tied, named)
    except RuntimeError:  # the model cannot compute any more
        return False


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    for title, stage in STAGES.items():
        for side in ("inputs", "outputs"):
            results = {name: attempt(stage, tied, getattr(tied, side)) for name, tied in TIED_MODELS.items()}
            asked = {name: result for name, result in results.items() if result is not None}
            failed = [name for name, result in asked.items() if not result]
            print(f"{title}, {side}: {len(asked) - len(failed)} of {len(asked)}; not {', '.join(failed) or '-'}")


if __name__ == "__main__":
    main()
