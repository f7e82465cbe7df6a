# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Every registered method on one small language model, with the defaults of its config wherever these fit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


WIDTH, TOKENS, SAMPLES = 256, 64, 4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setup:
    """
    What a method is given beside the targets.

    Attributes:
        options: fields of its config.
        inputs: further arguments of the model, from the number of samples.
        needs: gives more fields that have to be made first, from the base model and a folder.
    """

    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Any]] = lambda samples: {}
    needs: Callable[[nn.Module, Path], dict[str, Any]] = lambda model, folder: {}


def experts(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Make the two LoRA adapters that X-LoRA mixes."""
    from peft import LoraConfig, get_peft_model

    paths = {}
    for name in ("0", "1"):
        adapted = get_peft_model(
            model, LoraConfig(target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
        )
        paths[name] = str(folder / f"expert_{name}")
        adapted.save_pretrained(paths[name])
        adapted.unload()
    return {"adapters": paths, "hidden_size": WIDTH}


def one_task(samples: int) -> dict[str, Any]:
    """All samples are of one task."""
    return {"task_ids": torch.zeros(samples, dtype=torch.long)}


PROMPT = {"num_virtual_tokens": 8}
SETUPS: dict[str, Setup] = {
    "ADALORA": Setup({"total_step": 1000}),
    "ADAPTION_PROMPT": Setup({"adapter_len": 8, "adapter_layers": 2, "target_modules": None}),
    "CARTRIDGE": Setup(PROMPT),
    "CPT": Setup({"cpt_token_ids": list(range(8))}),
    "FROD": Setup({"progressbar": False}),
    "IA3": Setup({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LN_TUNING": Setup({"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "MULTITASK_PROMPT_TUNING": Setup({**PROMPT, "num_tasks": 1, "prompt_tuning_init": "RANDOM"}, inputs=one_task),
    "POLY": Setup({"n_tasks": 1}, inputs=one_task),
    "PREFIX_TUNING": Setup(PROMPT),
    "PROMPT_TUNING": Setup(PROMPT),
    "P_TUNING": Setup({**PROMPT, "encoder_hidden_size": 64}),
    "SHADOW": Setup({"target_modules": None}),
    "TRAINABLE_TOKENS": Setup({"token_indices": list(range(16)), "target_modules": ["embed_tokens"]}),
    "XLORA": Setup(needs=experts),
}


def setup_of(method: str) -> Setup:
    """Give the entry of a method; one without an entry, such as one that was registered outside, has the defaults."""
    return SETUPS.get(method, Setup())


def methods() -> list[str]:
    """Name every registered method."""
    return sorted(str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING)


def config_of(method: str, model: nn.Module, folder: Path) -> Any:
    """Make the config of a method, with the targets that all methods share if they take some."""
    setup, config_cls = setup_of(method), PEFT_TYPE_TO_CONFIG_MAPPING[method]
    options = {"task_type": "CAUSAL_LM", **setup.options, **setup.needs(model, folder)}
    if "target_modules" in config_cls.__dataclass_fields__:
        options.setdefault("target_modules", LINEARS)
    return config_cls(**options)


def language_model() -> nn.Module:
    """Make a Llama of two layers, with the biases that some methods train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_bias=True,
            mlp_bias=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            use_cache=False,
        )
    )
