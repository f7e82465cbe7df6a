# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Models that read `tie_word_embeddings` in their forward pass: merged and reopened, they compute what was trained."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.helpers import assert_close, llama
from torch import nn

from peft import LoraConfig, PeftWarning, get_peft_model, weight_tying_report
from peft.tying.flag import computes_with_flag


SIZES = {
    "vocab_size": 24,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
}
EXPERTS = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
MODELS: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {},
    "UMT5ForConditionalGeneration": {},
    "MT5ForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": EXPERTS,
    "UdopForConditionalGeneration": {"image_size": 16, "patch_size": 8},
}
READ_IN_FORWARD = ("SwitchTransformersForConditionalGeneration", "UdopForConditionalGeneration")
ROUTES = {
    "saved": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    "targeted": {"target_modules": ["q", "lm_head"]},
    "embedding": {"target_modules": ["q", "shared"]},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**SIZES, **MODELS[name])).eval()


def logits(model: nn.Module) -> torch.Tensor:
    boxes = {"bbox": torch.zeros(1, 3, 4)} if model.config.model_type == "udop" else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3]]), decoder_input_ids=torch.tensor([[1, 5]]), **boxes).logits


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_merged_and_reopened_models_compute_what_was_trained_apart(name: str, route: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(build(name), LoraConfig(**ROUTES[route], init_lora_weights=False)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = logits(model)
    with pytest.warns(PeftWarning, match="no longer tied") as caught:
        merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert any("transformers 5" in str(w.message) for w in caught) == (name in READ_IN_FORWARD)
    assert weight_tying_report(merged).holds
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path).eval()), expected)

    again = copy.deepcopy(merged)
    again.tie_weights()
    assert_close(logits(again), expected)


class Base(nn.Module):
    """A model whose config says that embeddings are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.config = llama(tied=True).config


class InAHelper(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return [x / 2 if self.config.tie_word_embeddings else x for _ in range(1)][0]


class NotInForward(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def resize(self) -> bool:
        return self.config.tie_word_embeddings


def test_what_a_forward_pass_reads_is_told_from_its_code() -> None:
    assert computes_with_flag(InAHelper()) and computes_with_flag(nn.Sequential(InAHelper()))
    assert not computes_with_flag(NotInForward()) and not computes_with_flag(llama(tied=True))
    assert [name for name in MODELS if computes_with_flag(build(name))] == list(READ_IN_FORWARD)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_a_tie_that_is_declared_only_is_not_restored_over_what_was_trained(targets: list[str], tmp_path: Path) -> None:
    """Files that hold both members of a declared tie are read as two tensors, of which a reader would lose one."""
    base = llama(tied=True)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone() + 1)
    ids = torch.tensor([[1, 2, 3]])
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    expected = model(ids).logits
    with pytest.warns(PeftWarning, match="tie_word_embeddings is False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert_close(type(base).from_pretrained(tmp_path)(ids).logits, expected)


def test_a_tie_that_is_declared_only_stays_so_where_nothing_was_adapted() -> None:
    base = llama(tied=True)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone() + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        get_peft_model(base, LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    assert base.config.tie_word_embeddings is True


@pytest.mark.parametrize("route", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_tie_that_was_kept_is_declared_although_the_flag_was_cleared_for_the_merge(route, tmp_path: Path) -> None:
    """ms-swift clears it before it merges an adapter that has trained both members."""
    options = {"target_modules": ["q_proj"], **route}
    model = get_peft_model(
        llama(tied=True), LoraConfig(**options, ensure_weight_tying=True, init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    model.get_base_model().config.tie_word_embeddings = False
    with pytest.warns(PeftWarning, match="it is True in its config now"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_close(type(merged).from_pretrained(tmp_path)(ids).logits, expected)


def test_two_tensors_are_not_declared_to_be_tied() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        assert model.merge_and_unload().config.tie_word_embeddings is False
