# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A saved config targets every member of a tie that the file has tensors for, for readers that know of no ties."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.helpers import assert_close, llama, logits, randomise, token_ids
from torch import nn

from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model


IDS = token_ids()


def saved(config: PeftConfig, folder: Path, base: nn.Module | None = None) -> tuple[object, set[str]]:
    """Save an adapter; give the targets that its config names, and the modules that its file has tensors of."""
    model = get_peft_model(llama(tied=True) if base is None else base, config)
    randomise(model, "lora_|hada_|ia3_|vera_lambda")
    targets = model.peft_config["default"].target_modules
    model.save_pretrained(folder)
    assert model.peft_config["default"].target_modules == targets
    named = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    keys = load_file(folder / "adapter_model.safetensors")
    return named, {re.split(r"\.(?:lora|hada|ia3|vera)_", key.removeprefix("base_model.model."))[0] for key in keys}


def matches(named: object, module: str) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in named)


@pytest.mark.parametrize(
    "targets",
    [
        ["embed_tokens", "q_proj"],
        ["lm_head"],
        ["lm_head", "embed_tokens"],
        r".*\.q_proj|lm_head",
        ["model.embed_tokens"],
    ],
    ids=str,
)
def test_all_members_are_named(targets: object, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
    named, inside = saved(config, tmp_path)
    assert {"model.embed_tokens", "lm_head"} <= inside
    assert all(matches(named, module) for module in inside)
    assert not isinstance(named, list) or len(named) == len(set(named))
    assert not any(matches(named, other) for other in ("model.layers.0.self_attn.o_proj", "model.norm"))
    again = PeftModel.from_pretrained(llama(tied=True), tmp_path)
    expected = logits(again, IDS)
    result = again.load_adapter(tmp_path, "default")
    assert not result.report.settings and not [w for w in recwarn.list if "embed" in str(w.message)]
    assert_close(logits(again, IDS), expected)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"] == named


def test_loading_over_the_adapter_that_was_saved_finds_no_other_settings(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config)
    model.save_pretrained(tmp_path)
    assert not model.load_adapter(tmp_path, "default").report.settings


def test_what_the_file_has_no_tensors_of_is_not_named(tmp_path: Path) -> None:
    """Where members have layers of two kinds, a method that cannot transpose its tensors writes them once."""
    for number, method in enumerate((LoHaConfig, IA3Config, VeraConfig)):
        options = {"feedforward_modules": []} if method is IA3Config else {"r": 2}
        config = method(target_modules=["lm_head"], ensure_weight_tying=True, **options)
        named, inside = saved(config, tmp_path / str(number))
        assert "model.embed_tokens" not in inside and named == ["lm_head"]


def test_a_name_that_others_have_too_is_written_in_full(tmp_path: Path) -> None:
    base = llama(tied=True)
    base.other = nn.ModuleDict({"lm_head": nn.Linear(4, 4)})
    named, _ = saved(LoraConfig(r=2, target_modules=["model.embed_tokens"], ensure_weight_tying=True), tmp_path, base)
    assert sorted(named) == ["lm_head", "model.embed_tokens"]
