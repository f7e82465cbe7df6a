# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Starts that learn from data or weights, each with another option of LoRA: it works at all stages, or is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, differs, llama, logits, snapshot, token_ids
from torch import nn

from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.error import PeftError


IDS = token_ids()
SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": EvaConfig(rho=1.0)},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "loftq": {"loftq_config": LoftQConfig(loftq_bits=8)},
    "mica": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}},
    "dropout": {"lora_dropout": 0.3},
    "invoked": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "all"},
    "replicated": {"layer_replication": [(0, 2), (1, 2)]},
    "parameters": {"target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
    "tied": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
}


def prepared(start: str, option: str, folder: Path, base: nn.Module) -> LoraConfig:
    """Make a config, and prepare a base model for it; with files, so that another one can be prepared alike."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **SETTINGS[start]}
    if start == "corda":
        settings["corda_config"] = CordaConfig(cache_file=str(folder / "corda.pt"))
    config = LoraConfig(init_lora_weights=start, **{**settings, **OPTIONS[option]})
    if start == "corda":
        preprocess_corda(base, config, run_model=lambda: base(IDS))
    elif start == "lora_ga":
        step = lambda: base(IDS).logits.pow(2).mean().backward()  # noqa: E731
        preprocess_loraga(base, config, step, cache_file=folder / "gradients.pt")
    return config


def adapted(base: nn.Module, config: LoraConfig) -> PeftModel:
    model = get_peft_model(base, config, low_cpu_mem_usage=False)
    if config.init_lora_weights == "eva":
        batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("start", SETTINGS)
def test_a_start_works_with_an_option_or_is_refused(start: str, option: str, tmp_path: Path) -> None:
    tied = option == "tied"
    try:
        base = llama(tied=tied)
        config = prepared(start, option, tmp_path, base)
        before = snapshot(base)
        model = adapted(base, config)
    except (PeftError, ValueError) as refusal:
        assert len(str(refusal)) > 40
        if "before" in locals():
            assert snapshot(base) == before
        return
    if option != "replicated":
        expected = logits(llama(tied=tied), IDS)
        assert_close(logits(model, IDS), expected, atol=0.2 if start == "loftq" else 1e-3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.add_(0.2)
    output = logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    again = llama(tied=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared(start, option, tmp_path, again)
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_close(logits(loaded, IDS), output, atol=1e-3)
    if option == "invoked":
        return  # cannot be merged
    assert differs(output, logits(llama(tied=tied), IDS))
    model.merge_adapter()
    assert_close(logits(model, IDS), output, atol=1e-2)
    model.unmerge_adapter()
    assert_close(logits(model, IDS), output, atol=1e-3)
