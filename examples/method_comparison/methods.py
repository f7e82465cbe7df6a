# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How each method is set up, so that most of them train some thousand numbers of the small model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


# the rates that are tried with the first seed; the best one on the validation text is kept
RATES = (1e-3, 1e-2, 1e-1)
VIRTUAL_TOKENS = 8


@dataclass(frozen=True)
class Setup:
    """
    What a method is given beside the targets.

    Attributes:
        options: fields of its config.
        inputs: further arguments of the model, from the number of samples.
        needs: gives more fields that have to be made first, from the base model and a folder.
        targets: whether it is given the same targets as the others, or chooses its own.
    """

    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Any]] = lambda samples: {}
    needs: Callable[[torch.nn.Module, Path], dict[str, Any]] = lambda model, folder: {}
    targets: bool = True


def experts(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Make two LoRA adapters, which X-LoRA mixes and goes on to train."""
    paths = {}
    for name in ("0", "1"):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        paths[name] = str(folder / f"expert_{name}")
        adapted.save_pretrained(paths[name])
        adapted.unload()
    return {"adapters": paths, "hidden_size": model.config.hidden_size, "use_trainable_adapters": True}


def one_task(samples: int) -> dict[str, Any]:
    """All samples are of one task."""
    return {"task_ids": torch.zeros(samples, dtype=torch.long)}


PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS}
SETUPS: dict[str, Setup] = {
    "ADALORA": Setup({"init_r": 6, "target_r": 4, "total_step": 1000, "tinit": 10, "tfinal": 100}),
    "ADAPTION_PROMPT": Setup({"adapter_len": VIRTUAL_TOKENS, "adapter_layers": 4}, targets=False),
    "BOFT": Setup({"boft_block_size": 8}),
    "C3A": Setup({"block_size": 8}),
    "CARTRIDGE": Setup(PROMPT, targets=False),
    "CPT": Setup({"cpt_token_ids": list(range(VIRTUAL_TOKENS))}, targets=False),
    "FOURIERFT": Setup({"n_frequency": 512}),
    "IA3": Setup(
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, targets=False
    ),
    "LN_TUNING": Setup(targets=False),
    "MULTITASK_PROMPT_TUNING": Setup(
        {**PROMPT, "num_tasks": 1, "prompt_tuning_init": "RANDOM"}, inputs=one_task, targets=False
    ),
    "OFT": Setup({"r": 0, "oft_block_size": 16}),
    "POLY": Setup({"n_tasks": 1, "n_skills": 2, "r": 2}, inputs=one_task),
    "PREFIX_TUNING": Setup(PROMPT, targets=False),
    "PROMPT_TUNING": Setup(PROMPT, targets=False),
    "P_TUNING": Setup({**PROMPT, "encoder_hidden_size": 32}, targets=False),
    "SHADOW": Setup(targets=False),
    "TRAINABLE_TOKENS": Setup({"token_indices": list(range(256))}, targets=False),
    "UNILORA": Setup({"theta_d_length": 2048}),
    "VBLORA": Setup({"r": 2, "num_vectors": 32, "vector_length": 16, "topk": 2}),
    "VERA": Setup({"r": 64}),
    "WAVEFT": Setup({"n_frequency": 512}),
    "XLORA": Setup({"xlora_depth": 1}, needs=experts, targets=False),
}
# what a config is given if it has such a field and the method has no entry for it
USUAL = {"r": 4, "block_size": 8, "n_frequency": 512}


def setup_of(method: str) -> Setup:
    """Give the entry of a method; one without an entry, such as one that was registered outside, has the defaults."""
    return SETUPS.get(method, Setup())


def config_of(method: str, model: torch.nn.Module, folder: Path) -> Any:
    """Make the config of a method, with the targets that all methods share if they take some."""
    setup, config_cls = setup_of(method), PEFT_TYPE_TO_CONFIG_MAPPING[method]
    fields = config_cls.__dataclass_fields__
    options = {name: value for name, value in USUAL.items() if name in fields}
    if setup.targets and "target_modules" in fields:
        options["target_modules"] = ["q_proj", "v_proj"]
    return config_cls(**{"task_type": "CAUSAL_LM", **options, **setup.options, **setup.needs(model, folder)})


def methods() -> list[str]:
    """Name every registered method."""
    return sorted(str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING)
