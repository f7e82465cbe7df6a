# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""unsloth adapts on its CPU backend, trains through TRL and merges; it ties a redirected pair by itself."""

from pathlib import Path

import pytest


CLIENT = "unsloth"
pytestmark = pytest.mark.own_environment
unsloth = pytest.importorskip("unsloth")  # patches transformers and TRL, so it goes first

import torch  # noqa: E402
from support.client_runs import (  # noqa: E402
    adapted,
    assert_imports_recorded,
    assert_merged,
    assert_same_adapter,
    assert_tied,
    outputs,
    write_base,
)
from support.helpers import differs  # noqa: E402


SOME = ["q_proj", "v_proj"]
ROUTES = {
    "plain": {"target_modules": SOME},
    "saved_embedding": {"target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    "saved_both": {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted": {"target_modules": [*SOME, "embed_tokens"]},
    "targeted_both": {"target_modules": [*SOME, "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": SOME, "trainable_token_indices": [4, 5, 9]},
}


def prepared(base: str, **options):
    """A model with an adapter, made as unsloth's notebooks make it."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        base, max_seq_length=16, dtype=torch.float32, load_in_4bit=False
    )
    options = {"r": 2, "lora_alpha": 4, "use_rslora": True, "use_gradient_checkpointing": False, **options}
    return unsloth.FastLanguageModel.get_peft_model(model, **options), tokenizer


def train(folder: Path, base: str, sentences: list[str], resume: Path | None = None, **options):
    """Two steps of TRL's supervised training, with a checkpoint after each."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = prepared(base, **options)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": sentences}),
        args=SFTConfig(
            str(folder),
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_length=16,
            report_to="none",
            use_cpu=True,
            bf16=False,
            fp16=False,
            seed=0,
        ),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_training_is_resumed_and_merged(route, tied, tokenizer, sentences, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    options = {**ROUTES[route], "ensure_weight_tying": tied and route != "plain"}
    whole = tmp_path / "whole"
    model, words = train(whole, base, sentences, **options)
    assert model.peft_config["default"].use_rslora
    assert model.peft_config["default"].ensure_weight_tying == options["ensure_weight_tying"]

    read = adapted(base, whole)
    assert differs(outputs(read), outputs(base))
    assert_tied(read)

    train(tmp_path / "resumed", base, sentences, resume=whole / "checkpoint-1", **options)
    assert_same_adapter(tmp_path / "resumed", whole)

    model.save_pretrained_merged(str(tmp_path / "merged"), words, save_method="merged_16bit")
    assert_merged(tmp_path / "merged", read, tied, dtype=torch.bfloat16)


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("unsloth", "unsloth_zoo")
