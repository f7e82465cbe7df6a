# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is trained in full or token by token: which names reach it, and which heads a task trains by itself."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_equal, llama, logits, seeded, token_ids, trainable, warned
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peft.layers.training_wrapper import AuxiliaryTrainingWrapper
from peft.surgery.saved_modules import newly_started_heads


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.pre_classifier, self.classifier = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.input_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.emb, self.word_emb = nn.Embedding(9, 4), nn.Embedding(9, 4)


def blocks() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "final_norm": nn.LayerNorm(4)})


def wrapped(model: nn.Module) -> set[str]:
    names = {name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    return {name.removeprefix("base_model.model.") for name in names}


def in_layers(*names: str) -> set[str]:
    return {f"layers.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize(
    ("entry", "reached"),
    [
        ("classifier", in_layers("classifier", "pre_classifier")),
        ("norm", in_layers("norm", "input_norm") | {"final_norm"}),
        ("layers.0.norm", {"layers.0.norm"}),
        ("ayers.0.norm", {"layers.0.norm"}),
        ("emb", in_layers("emb", "word_emb")),
    ],
)
@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_names_of_saved_modules_are_endings(config_cls: Any, entry: str, reached: set[str]) -> None:
    kwargs = {"feedforward_modules": []} if config_cls is IA3Config else {}
    model = get_peft_model(blocks(), config_cls(target_modules=["q"], modules_to_save=[entry], **kwargs))
    assert wrapped(model) == reached


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"emb": [1]}, {"emb": [1], "word_emb": [1]}),
        ({"word_emb": [2]}, {"word_emb": [2]}),
        ({"word_emb": [2], "emb": [1]}, {"emb": [1], "word_emb": [2]}),
        ({"emb": [1], "word_emb": [2]}, {"emb": [1], "word_emb": [1]}),
    ],
)
def test_names_of_modules_with_trained_tokens_are_endings(tokens: dict, expected: dict) -> None:
    model = get_peft_model(blocks(), LoraConfig(target_modules=["q"], trainable_token_indices=tokens))
    found = {name: model.get_submodule(f"base_model.model.{name}").token_adapter for name in wrapped(model)}
    assert {name: layer.token_indices["default"] for name, layer in found.items()} == {
        f"layers.{i}.{name}": indices for i in (0, 1) for name, indices in expected.items()
    }


def test_targets_still_match_at_a_dot_only() -> None:
    model = get_peft_model(blocks(), LNTuningConfig(target_modules=["norm"]))
    assert set(model.base_model.targeted_module_names) == in_layers("norm")


def test_an_empty_name_matches_nothing() -> None:
    with warned("modules_to_save entry '' matches no module"):
        assert wrapped(get_peft_model(blocks(), LoraConfig(target_modules=["q"], modules_to_save=[""]))) == set()


def test_a_target_that_is_trained_in_full_is_told() -> None:
    config = LoraConfig(target_modules=["q", "pre_classifier"], modules_to_save=["classifier"])
    with warned("'layers.0.pre_classifier'", "'classifier'", "trained in full"):
        model = get_peft_model(blocks(), config)
    assert set(model.base_model.targeted_module_names) == in_layers("q")
    model = get_peft_model(blocks(), LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    assert set(model.base_model.targeted_module_names) == in_layers("q")


@pytest.mark.parametrize("entry", ["head", "tokens"])
def test_ties_are_recorded_for_what_an_ending_reaches(entry: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[entry], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config)
    assert model.peft_config["default"].modules_to_tie == {"lm_head": "model.embed_tokens"}
    assert wrapped(model) == {"lm_head", "model.embed_tokens"}
    with warned("lm_head", "ensure_weight_tying=True"):
        get_peft_model(llama(tied=True), LoraConfig(target_modules=["q_proj"], modules_to_save=[entry]))


# ------------------------------------------------------------------------------------------ heads of tasks
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def distilbert(seed: int = 0) -> nn.Module:
    config = DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=2, vocab_size=40)
    with seeded(seed):
        return DistilBertForSequenceClassification(config).eval()


def deberta(folder: Path) -> nn.Module:
    """A classifier whose body was read from a checkpoint, and whose head has started anew."""
    if not folder.exists():
        with seeded(0):
            DebertaV2Model(DebertaV2Config(**SIZES)).save_pretrained(folder)
    return DebertaV2ForSequenceClassification.from_pretrained(folder).eval()


def give_the_head_other_values(model: nn.Module) -> nn.Module:
    with torch.no_grad(), seeded(7):
        for name, parameter in model.named_parameters():
            if name.startswith(("pre_classifier", "classifier", "pooler")):
                parameter.normal_()
    return model


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_whole_head_of_distilbert_is_trained_and_saved(task: str, tmp_path: Path) -> None:
    model = get_peft_model(distilbert(), LoraConfig(task_type=task, target_modules=["q_lin"])).eval()
    assert {"pre_classifier", "classifier"} == wrapped(model)
    give_the_head_other_values(model)
    model.save_pretrained(tmp_path)
    assert {f"base_model.model.{name}.weight" for name in wrapped(model)} <= set(
        load_file(f"{tmp_path}/adapter_model.safetensors")
    )
    again = PeftModel.from_pretrained(give_the_head_other_values(distilbert()), tmp_path)
    assert again.load_reports["default"].complete
    assert_equal(logits(again, token_ids(vocabulary=40)), logits(model, token_ids(vocabulary=40)))


def test_a_head_that_no_checkpoint_has_filled_is_trained(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])
    base = deberta(tmp_path / "body")
    assert newly_started_heads(base) == ["pooler", "classifier"]
    model = get_peft_model(base, config)
    assert wrapped(model) == {"pooler", "classifier"}
    assert any("pooler" in name for name in trainable(model))
    assert config.modules_to_save is None
    model.add_adapter("other", config)
    assert "other" in model.base_model.model.pooler.modules_to_save
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(give_the_head_other_values(deberta(tmp_path / "body")), tmp_path / "adapter")
    assert_equal(logits(again, token_ids(vocabulary=40)), logits(model.eval(), token_ids(vocabulary=40)))


def test_a_head_from_a_checkpoint_is_left_to_the_names_of_the_task(tmp_path: Path) -> None:
    deberta(tmp_path / "body").save_pretrained(tmp_path / "whole")
    base = deberta(tmp_path / "whole")
    assert newly_started_heads(base) == []
    assert wrapped(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"]))) == {
        "classifier"
    }


@pytest.mark.parametrize("own_config", [False, True])
def test_an_adapter_that_was_saved_without_the_pooler_loads_whole(own_config: bool, tmp_path: Path) -> None:
    model = get_peft_model(deberta(tmp_path / "body"), LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"modules_to_save": ["classifier", "score"]}
    path.write_text(json.dumps(values))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "pooler" not in key}, file)
    given = {"config": LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])} if own_config else {}
    again = PeftModel.from_pretrained(deberta(tmp_path / "body"), tmp_path / "adapter", **given)
    assert again.load_reports["default"].complete
    assert wrapped(again) == {"classifier"}


def test_heads_of_other_names() -> None:
    sizes = {
        f"{side}_{what}": 8 if "dim" in what else 1
        for side in ("encoder", "decoder")
        for what in ("layers", "ffn_dim")
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    base = BartForSequenceClassification(BartConfig(vocab_size=40, d_model=8, **sizes, **heads))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    assert wrapped(model) == {"classification_head"}


def test_an_output_embedding_is_no_head_of_a_task() -> None:
    for tied in (False, True):
        assert newly_started_heads(llama(tied=tied)) == []
    assert newly_started_heads(nn.Sequential(nn.Linear(2, 2))) == []
