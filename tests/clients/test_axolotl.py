# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""axolotl trains, resumes and merges; it passes `ensure_weight_tying` on."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from support.client_runs import (
    adapted,
    assert_imports_recorded,
    assert_merged,
    assert_same_adapter,
    assert_tied,
    outputs,
    write_base,
)
from support.helpers import differs


CLIENT = "axolotl"
pytestmark = pytest.mark.own_environment

SOME = ["q_proj", "v_proj"]
ROUTES = {
    "plain": {"lora_target_modules": SOME},
    "saved_embedding": {"lora_target_modules": SOME, "lora_modules_to_save": ["embed_tokens"]},
    "saved_both": {"lora_target_modules": SOME, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted": {"lora_target_modules": [*SOME, "embed_tokens"]},
    "targeted_both": {"lora_target_modules": [*SOME, "embed_tokens", "lm_head"]},
    "tokens": {"lora_target_modules": SOME, "peft_trainable_token_indices": [4, 5, 9]},
}


@pytest.fixture(autouse=True)
def start(monkeypatch, tmp_path):
    """Nothing is sent, no argument of pytest is read as one of axolotl, and its files go to a folder of their own."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.chdir(tmp_path)


def write(folder: Path, base: str, **options) -> str:
    """Write the file that axolotl reads."""
    data = folder.parent / "tiny.jsonl"
    data.write_text("\n".join([json.dumps({"text": "one tensor stay one after training"})] * 8))
    settings = {
        "base_model": base,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "completion"}],
        "special_tokens": {"pad_token": "<pad>"},
        "adapter": "lora",
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0,
        # Its fused kernels are written for Triton and a GPU.
        **dict.fromkeys(["lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"], False),
        "sequence_len": 16,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "save_steps": 1,
        "val_set_size": 0,
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "output_dir": str(folder),
        "seed": 0,
        **dict.fromkeys(["bf16", "fp16", "tf32", "flash_attention"], False),
        **options,
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def train(folder: Path, base: str, **options) -> Path:
    """Two steps, as `axolotl train` does them."""
    from axolotl.cli.train import do_cli

    do_cli(write(folder, base, **options))
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_training_is_resumed_and_merged(route, tied, tokenizer, tmp_path):
    from axolotl.cli.merge_lora import do_cli

    base = write_base(tmp_path / "base", tied, tokenizer)
    options = {**ROUTES[route], "peft_ensure_weight_tying": tied and route != "plain"}
    whole = train(tmp_path / "whole", base, **options)
    model = adapted(base, whole)
    assert differs(outputs(model), outputs(base))
    assert_tied(model)

    resumed = train(tmp_path / "resumed", base, **options, resume_from_checkpoint=str(whole / "checkpoint-1"))
    assert_same_adapter(resumed, whole)

    do_cli(write(whole, base, **options, merge_method="legacy"), lora_model_dir=str(whole))
    assert_merged(whole / "merged", model, tied)


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("axolotl")
