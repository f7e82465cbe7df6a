# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tokens of one tied module and the whole of another one: the whole matrix is trained, with one warning."""

import pytest
import torch
from support.helpers import assert_close, logits, randomise, warned
from support.tied_models import llama

from peft import LoraConfig, PeftModel, get_peft_model, weight_tying_report


IDS = torch.arange(4, 14).reshape(2, 5)
SAVED = "modules_to_save.default.weight"


def config(tokens: object, saved: list[str]) -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices=tokens,
        modules_to_save=saved,
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize(
    ("tokens", "saved", "named"),
    [
        ({"embed_tokens": [4, 5]}, ["lm_head"], ("'model.embed_tokens'", "'lm_head'")),
        ([4, 5], ["lm_head"], ("'model.embed_tokens'", "'lm_head'")),
        ({"lm_head": [4, 5]}, ["embed_tokens"], ("'lm_head'", "'model.embed_tokens'")),
    ],
)
def test_the_whole_matrix_is_trained(tokens, saved, named, tmp_path, recwarn):
    asked = config(tokens, saved)
    with warned("trainable_token_indices names tokens of", "the whole matrix is trained", *named):
        model = get_peft_model(llama(), asked)
    assert asked.trainable_token_indices == tokens and model.peft_config["default"].trainable_token_indices is None
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == [f"base_model.model.model.embed_tokens.{SAVED}"]
    assert weight_tying_report(model).holds

    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_parameter(trained[0]).grad[4:6].abs().sum() > 0
    randomise(model, "lora_|modules_to_save")
    model.save_pretrained(tmp_path)
    recwarn.clear()
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert not recwarn.list
    assert weight_tying_report(again).holds
    assert_close(logits(again, IDS), logits(model, IDS))


def test_tokens_of_other_modules_stay():
    model = llama()
    model.extra = torch.nn.Embedding(9, 4)
    with warned("the whole matrix is trained"):
        model = get_peft_model(model, config({"embed_tokens": [4], "extra": [1, 2]}, ["lm_head"]))
    assert model.peft_config["default"].trainable_token_indices == {"extra": [1, 2]}
    assert model.get_base_model().extra.token_adapter.token_indices["default"] == [1, 2]
