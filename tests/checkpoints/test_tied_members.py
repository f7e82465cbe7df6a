# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters of a tied head, on models of the same family that have no head."""

import warnings
from pathlib import Path

import pytest
import torch
from support.helpers import differs, llama, token_ids
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model


CONFIGS = {
    "names": LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "expression": LoraConfig(target_modules=r".*(q_proj|lm_head)", init_lora_weights=False),
    "saved": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}),
    "only tokens": TrainableTokensConfig(target_modules=["lm_head"], token_indices=[3, 5]),
}


def classifier() -> LlamaForSequenceClassification:
    """A model with the body of `llama(tied=True)`."""
    base = llama(tied=True)
    config = LlamaConfig(**{**base.config.to_dict(), "pad_token_id": 0})
    model = LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(base.model.state_dict())
    return model


def quiet(load, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*args, **options)


def save(config: PeftConfig, folder: Path, **options) -> torch.Tensor:
    """Save an adapter of a tied model, and give the embeddings that it has trained."""
    config.ensure_weight_tying = True
    model = get_peft_model(llama(tied=True), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return embeddings(model)


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.get_base_model().get_input_embeddings()(token_ids())


@pytest.mark.parametrize("deduplicate_tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_embeddings_part_is_loaded_where_the_named_head_is_absent(name, deduplicate_tied, tmp_path) -> None:
    expected = save(CONFIGS[name], tmp_path, deduplicate_tied=deduplicate_tied)
    assert differs(expected, classifier().get_input_embeddings()(token_ids()))
    model = quiet(PeftModel.from_pretrained, classifier(), tmp_path)
    torch.testing.assert_close(embeddings(model), expected)
    quiet(model.load_adapter, tmp_path, "second")
    model.set_adapter("second")
    torch.testing.assert_close(embeddings(model), expected)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* belong to nothing in the model")
        warnings.filterwarnings("error", message=".*config|.*setting|.*differ")
        model.load_adapter(tmp_path, "default")

    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    for base in (classifier(), llama(tied=True)):
        again = quiet(PeftModel.from_pretrained, base, tmp_path / "again")
        torch.testing.assert_close(embeddings(again), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_added_where_the_head_is_present(name, tmp_path) -> None:
    save(CONFIGS[name], tmp_path)
    model = PeftModel.from_pretrained(llama(tied=True), tmp_path)
    kept = ("target_modules", "modules_to_save", "trainable_token_indices")
    found, written = (c.to_dict() for c in (model.peft_config["default"], PeftConfig.from_pretrained(tmp_path)))
    assert {key: found.get(key) for key in kept} == {key: written.get(key) for key in kept}
