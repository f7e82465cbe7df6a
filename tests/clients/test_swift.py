# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""ms-swift trains, resumes and merges. It has no option for ties: `PEFT_ENSURE_WEIGHT_TYING` is how to ask."""

import json
from pathlib import Path

import pytest
import torch
from support.client_runs import (
    adapted,
    assert_imports_recorded,
    assert_merged,
    assert_same_adapter,
    assert_tied,
    outputs,
    write_base,
)
from support.helpers import differs, llama

from peft import LoraConfig, get_peft_model


CLIENT = "ms-swift"
pytestmark = pytest.mark.own_environment

SOME = ["--target_modules", "q_proj", "v_proj"]
ROUTES = {
    "plain": SOME,
    "saved_embedding": [*SOME, "--modules_to_save", "embed_tokens"],
    "saved_head": [*SOME, "--modules_to_save", "lm_head"],
    "saved_both": [*SOME, "--modules_to_save", "embed_tokens", "lm_head"],
    "targeted": [*SOME, "embed_tokens"],
    "targeted_both": [*SOME, "embed_tokens", "lm_head"],
}
OF_THE_MODEL = ["--model_type", "llama", "--template", "dummy", "--torch_dtype", "float32"]


@pytest.fixture(autouse=True)
def environment():
    assert LoraConfig().ensure_weight_tying, "PEFT_ENSURE_WEIGHT_TYING=1 has to be there from the start"


def train(folder: Path, base: str, *options: str) -> Path:
    """Two steps of supervised training, as `swift sft` does them."""
    from swift.pipelines import sft_main

    turn = {"messages": [
        {"role": "user", "content": "one tensor"}, {"role": "assistant", "content": "stay one after training"}
    ]}  # fmt: skip
    data = folder.parent / "tiny.jsonl"
    data.write_text("\n".join([json.dumps(turn)] * 8))
    sft_main([
        *("--model", base, *OF_THE_MODEL, "--dataset", str(data), "--output_dir", str(folder)),
        *("--tuner_type", "lora", "--lora_rank", "2", "--lora_dropout", "0"),
        *("--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "2"),
        *("--learning_rate", "0.05", "--lr_scheduler_type", "constant", "--warmup_ratio", "0"),
        *("--max_length", "16", "--add_version", "false", "--report_to", "none", "--use_cpu", "true"),
        *("--gradient_checkpointing", "false", "--eval_strategy", "no", "--split_dataset_ratio", "0", "--seed", "0"),
        *("--load_from_cache_file", "false", "--dataloader_num_workers", "0"),
        *options,
    ])  # fmt: skip
    return folder


def merge(base: str, adapter: Path, folder: Path) -> Path:
    """Merge, as `swift export --merge_lora true` does."""
    from swift.pipelines import export_main

    export_main([
        *("--model", base, *OF_THE_MODEL, "--adapters", str(adapter)),
        *("--merge_lora", "true", "--output_dir", str(folder)),
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_training_is_resumed_and_merged(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    whole = train(tmp_path / "whole", base, *ROUTES[route])
    model = adapted(base, whole / "checkpoint-2")
    assert differs(outputs(model), outputs(base))
    assert_tied(model)

    resumed = train(tmp_path / "resumed", base, *ROUTES[route],
                    "--resume_from_checkpoint", str(whole / "checkpoint-1"))  # fmt: skip
    assert_same_adapter(resumed / "checkpoint-2", whole / "checkpoint-2")

    assert_merged(merge(base, whole / "checkpoint-2", tmp_path / "merged"), model, tied)


def test_lora_plus_goes_on_from_a_checkpoint(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", True, tokenizer)
    options = [*SOME, "--lorap_lr_ratio", "4"]
    whole = train(tmp_path / "whole", base, *options)
    assert json.loads((whole / "checkpoint-1" / "additional_config.json").read_text())["lorap_lr_ratio"] == 4
    resumed = train(tmp_path / "resumed", base, *options, "--resume_from_checkpoint", str(whole / "checkpoint-1"))
    assert_same_adapter(resumed / "checkpoint-2", whole / "checkpoint-2")


def test_the_budget_of_adalora_is_distributed_by_the_client(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", True, tokenizer)
    options = ["--tuner_type", "adalora", "--adalora_init_r", "4", "--adalora_target_r", "2", *SOME]
    whole = train(tmp_path / "whole", base, *options)
    assert differs(outputs(adapted(base, whole / "checkpoint-2")), outputs(base))


def test_weights_are_handed_to_an_inference_engine_a_group_at_a_time():
    """Its trainers of preferences merge some layers, read their weights, and take the adapter out of them again."""
    from swift.rlhf_trainers.utils import patch_lora_merge, patch_lora_unmerge

    model = llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted_model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    expected = outputs(adapted_model)
    for own, other in (("q_proj", "v_proj"), ("v_proj", "q_proj")):
        group = [name for name, _ in adapted_model.named_parameters() if own in name]
        with patch_lora_merge(adapted_model, group):
            adapted_model.merge_adapter()
        state = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
        changed = {name for name, tensor in before.items() if not torch.allclose(state[name], tensor, atol=1e-5)}
        assert changed and all(own in name and other not in name for name in changed)
        torch.testing.assert_close(outputs(adapted_model), expected)
        with patch_lora_unmerge(adapted_model):
            adapted_model.unmerge_adapter()
    torch.testing.assert_close(outputs(adapted_model), expected)


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("swift")
