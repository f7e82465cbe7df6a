# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""sentence-transformers adds an adapter to its encoder, embeds sentences with it, saves it and loads it."""

import numpy as np
import pytest
from support.helpers import randomise, seeded
from transformers import BertConfig, BertModel

from peft import LoHaConfig, LoraConfig, OFTConfig


CLIENT = "sentence-transformers"
pytestmark = [
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
    pytest.mark.filterwarnings("ignore:the model holds adapters already:peft.PeftWarning"),
]

TARGETS = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
CONFIGS = {
    "LORA": LoraConfig(r=2, **TARGETS),
    "LOHA": LoHaConfig(r=2, **TARGETS),
    "OFT": OFTConfig(r=0, oft_block_size=4, **TARGETS),
}


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A sentence encoder on disk."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    config = BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with seeded():
        BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert"), max_seq_length=16), Pooling(16, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "base"))
    return tmp_path


def load(path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu")


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.wide] * (name != "LORA")) for name in CONFIGS]
)
def test_adapter_is_added_saved_and_loaded(method, folder, sentences):
    model = load(folder / "base")
    plain = model.encode(sentences)
    model.add_adapter(CONFIGS[method], "mine")
    assert model.active_adapters() == ["mine"]
    assert_same(model.encode(sentences), plain)
    randomise(model, "lora_|hada_|oft_")
    expected = model.encode(sentences)
    assert np.abs(expected - plain).max() > 1e-3

    model.disable_adapters()
    assert_same(model.encode(sentences), plain)
    model.enable_adapters()
    model.save(str(folder / "adapted"))
    assert not list((folder / "adapted").glob("**/model.safetensors"))

    again = load(folder / "adapted")
    assert_same(again.encode(sentences), expected)
    beside = load(folder / "base")
    beside.load_adapter(str(folder / "adapted"))
    assert_same(beside.encode(sentences), expected)


def test_adapters_are_switched_and_deleted(folder, sentences):
    model, outputs = load(folder / "base"), {}
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(CONFIGS["LORA"], name)
        randomise(model, rf"lora_.*{name}", seed)
        outputs[name] = model.encode(sentences)
    assert np.abs(outputs["one"] - outputs["two"]).max() > 1e-3
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    assert_same(model.encode(sentences), outputs["one"])
    state = model.get_adapter_state_dict("two")
    assert len(state) == 8 and all("lora_" in key for key in state)
    model.delete_adapter("one")
    assert model.active_adapters() == ["two"]
    assert_same(model.encode(sentences), outputs["two"])
    model.save(str(folder / "two"))
    model.delete_adapter("two")
    model.load_adapter(str(folder / "two"), "three")
    assert model.active_adapters() == ["three"]
    assert_same(model.encode(sentences), outputs["two"])
