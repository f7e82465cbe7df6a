# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Models that do not say which their embeddings are, or not all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, logits, randomise, refused, seeded
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    weight_tying_report,
)
from peft.anatomy.embeddings import input_embedding, output_embedding
from peft.utils import _get_input_embeddings_name
from peft.utils.save_and_load import get_embedding_layer_name, has_valid_embedding_base_layer


class Says(nn.Module):
    """A model that knows its input embedding and has no notion of an output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.words(ids))))


class SaysNone(Says):
    """One that answers that there is none."""

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None


class Refuses(Says):
    """One that does not answer, as vision models of transformers."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("no words here")

    def get_output_embeddings(self) -> nn.Module:
        raise AttributeError("lm_head")


MODELS = {"input only": Says, "none": SaysNone, "refuses": Refuses}


def made(cls: type[nn.Module]) -> nn.Module:
    with seeded():
        return cls().eval()


OPTIONS = {
    "layers": {"target_modules": ["hidden"]},
    "all-linear": {"target_modules": "all-linear"},
    "tied": {"target_modules": ["words"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["hidden"], "modules_to_save": ["head"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:the config reaches modules that share", "ignore:modules that shared a weight")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)
def test_adapters_are_saved_and_loaded(tmp_path: Path, cls: type[nn.Module], options: dict[str, Any]) -> None:
    model = get_peft_model(made(cls), LoraConfig(r=2, **options)).eval()
    randomise(model, "lora_|modules_to_save")
    model.save_pretrained(tmp_path, save_embedding_layers="auto")
    again = PeftModel.from_pretrained(made(cls), tmp_path, strict=True)
    ids = torch.tensor([[1, 5, 3]])
    assert_close(logits(again, ids), logits(model, ids))
    assert again.load_adapter(tmp_path, "other").unexpected_keys == []
    assert weight_tying_report(again).rows
    model.prepare_model_for_gradient_checkpointing(model.get_base_model())
    assert_close(logits(model.merge_and_unload(), ids), logits(again, ids))


def test_what_is_known_is_saved() -> None:
    model = get_peft_model(made(Says), LoraConfig(target_modules=["hidden"]))
    assert "base_model.model.words.weight" in get_peft_model_state_dict(model, save_embedding_layers=True)
    for cls in (SaysNone, Refuses):
        model = get_peft_model(made(cls), LoraConfig(target_modules=["hidden"]))
        with pytest.warns(UserWarning, match="does not say which layers its embeddings are"):
            get_peft_model_state_dict(model, save_embedding_layers=True)


@pytest.mark.parametrize("cls", [SaysNone, Refuses])
def test_prompts_need_the_embedding(cls: type[nn.Module]) -> None:
    sizes = {"num_virtual_tokens": 2, "token_dim": 8, "num_layers": 1, "num_attention_heads": 1}
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", **sizes)
    model = made(cls)
    with refused(model, ValueError, "input embedding", cls.__name__):
        get_peft_model(model, config)
    assert input_embedding(model) is None and output_embedding(model) is None


def test_vision_models_of_transformers(tmp_path: Path) -> None:
    def vision() -> nn.Module:
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2)
        with seeded():
            return ResNetForImageClassification(config).eval()

    config = LoraConfig(
        target_modules=["convolution"], modules_to_save=["classifier", "normalization"], init_lora_weights=False
    )
    model = get_peft_model(vision(), config).eval()
    model.save_pretrained(tmp_path)
    pictures = torch.ones(1, 3, 32, 32)
    assert_close(logits(PeftModel.from_pretrained(vision(), tmp_path), pictures), logits(model, pictures))


def test_names_of_embeddings() -> None:
    model = made(Says)
    assert _get_input_embeddings_name(model) == "words"
    assert _get_input_embeddings_name(nn.Linear(1, 1)) is None
    assert _get_input_embeddings_name(nn.Linear(1, 1), "wte") == "wte"
    words = model.words
    assert get_embedding_layer_name(model, words, False) == "words"
    assert get_embedding_layer_name(model, words, True) is None
    assert not has_valid_embedding_base_layer(words)
    get_peft_model(model, LoraConfig(target_modules=["words"]))
    assert get_embedding_layer_name(model, model.words, False) == "words"
    assert get_embedding_layer_name(model, model.words, True) == "words.base_layer"
    assert get_embedding_layer_name(model, nn.Linear(1, 1), False) is None
    assert has_valid_embedding_base_layer(model.words)
