# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LLaMA-Factory trains, resumes and exports. It has no option for ties: `PEFT_ENSURE_WEIGHT_TYING` is how to ask."""

import json
from pathlib import Path

import pytest
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

from peft import LoraConfig


CLIENT = "llamafactory"
pytestmark = pytest.mark.own_environment

ROUTES = {
    "plain": {"lora_target": "q_proj,v_proj"},
    "saved_embedding": {"lora_target": "q_proj,v_proj", "additional_target": "embed_tokens"},
    "saved_head": {"lora_target": "q_proj,v_proj", "additional_target": "lm_head"},
    "saved_both": {"lora_target": "q_proj,v_proj", "additional_target": "embed_tokens,lm_head"},
    "targeted": {"lora_target": "q_proj,v_proj,embed_tokens"},
    "targeted_both": {"lora_target": "q_proj,v_proj,embed_tokens,lm_head"},
}


@pytest.fixture(autouse=True)
def environment():
    assert LoraConfig().ensure_weight_tying, "PEFT_ENSURE_WEIGHT_TYING=1 has to be there from the start"


def train(folder: Path, base: str, **options) -> Path:
    """Two steps of supervised training, as `llamafactory-cli train` does them."""
    from llamafactory.train.tuner import run_exp

    data = [{"instruction": "one tensor", "input": "", "output": "stay one after training"}] * 8
    (folder.parent / "tiny.json").write_text(json.dumps(data))
    (folder.parent / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    run_exp({
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": base,
        "finetuning_type": "lora",
        "lora_rank": 2,
        "dataset": "tiny",
        "dataset_dir": str(folder.parent),
        "template": "empty",
        "cutoff_len": 16,
        "output_dir": str(folder),
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        **options,
    })  # fmt: skip
    return folder


def export(base: str, adapter: Path, folder: Path, **options) -> Path:
    """Merge, as `llamafactory-cli export` does."""
    from llamafactory.train.tuner import export_model

    export_model({
        "model_name_or_path": base,
        "adapter_name_or_path": str(adapter),
        "template": "empty",
        "finetuning_type": "lora",
        "export_dir": str(folder),
        "infer_dtype": "float32",
        **options,
    })  # fmt: skip
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_training_is_resumed_and_exported(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    whole = train(tmp_path / "whole", base, **ROUTES[route])
    model = adapted(base, whole)
    assert differs(outputs(model), outputs(base))
    assert_tied(model)

    resumed = train(tmp_path / "resumed", base, **ROUTES[route], resume_from_checkpoint=str(whole / "checkpoint-1"))
    assert_same_adapter(resumed, whole)

    assert_merged(export(base, whole, tmp_path / "merged"), model, tied)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_are_trained_with_both_sides(tied, tokenizer, tmp_path):
    """It cannot train single rows: `resize_vocab` saves the embedding and the head whole."""
    base = write_base(tmp_path / "base", tied, tokenizer)
    new = {"add_tokens": ",".join(f"new{i}" for i in range(40)), "resize_vocab": True}
    whole = train(tmp_path / "whole", base, lora_target="q_proj,v_proj", **new)
    model = adapted(base, whole, rows=128)
    assert_tied(model)
    assert model.get_input_embeddings().weight.shape[0] == 128

    merged = export(base, whole, tmp_path / "merged", **new)
    assert_merged(merged, model, tied)


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("llamafactory")
