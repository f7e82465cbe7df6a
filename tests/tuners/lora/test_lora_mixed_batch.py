# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Batches in which samples have different adapters: each sample gets what it would get alone with its adapter."""

import pytest
import torch
from support.helpers import assert_close, assert_equal, kinds, llama, logits, randomise, token_ids
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

ADAPTERS = {
    "a": {"r": 2},
    "b": {"r": 2, "lora_alpha": 1},
    "c": {"r": 2, "use_rslora": True},
    "wide": {"r": 5},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["lin", "conv"]},
    "elsewhere": {"r": 2, "target_modules": ["head"]},
}
BATCHES = {
    "one each": ["a", "b", "c"],
    "other order": ["c", "a", "b"],
    "some without": ["__base__", "c", "__base__", "a", "b"],
    "all without": ["__base__", "__base__"],
    "one for all": ["b", "b", "b"],
    "even": ["a", "b", "a", "b"],
    "uneven": ["a", "a", "b", "a", "b", "c", "c"],
    "very uneven": ["a"] * 9 + ["b", "c", "a"],
    "other ranks": ["wide", "a", "b", "wide"],
    "with a bias": ["biased", "a", "b", "biased"],
    "on other layers": ["elsewhere", "a", "b", "elsewhere", "__base__"],
}


def adapted(base: nn.Module, **changes) -> PeftModel:
    model = None
    for name, options in ADAPTERS.items():
        config = LoraConfig(**{"target_modules": ["emb", "conv", "lin", "head"], **options, **changes})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    randomise(model)
    return model.eval()


def one_by_one(model: PeftModel, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits(model, sample.unsqueeze(0)))
        else:
            model.set_adapter(name)
            rows.append(logits(model, sample.unsqueeze(0)))
    model.set_adapter("a")
    return torch.cat(rows)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_each_sample_gets_its_adapter(batch: str, length: int) -> None:
    model, names = adapted(kinds()), BATCHES[batch]
    x = token_ids(len(names), length, vocabulary=12)
    before = logits(model, x)
    assert_close(logits(model, x, adapter_names=names), one_by_one(model, x, names))
    assert_equal(logits(model, x), before)


@pytest.mark.parametrize("batch", BATCHES)
def test_inputs_without_a_sequence(batch: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model, names = adapted(net, target_modules=["0", "2"]), BATCHES[batch]
    x = torch.randn(len(names), 6)
    assert_close(logits(model, x, adapter_names=names), one_by_one(model, x, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    model, names = adapted(net, target_modules=["0", "2"]), BATCHES["uneven"]
    x = torch.randn(len(names), 6, dtype=dtype)
    mixed = logits(model, x, adapter_names=names)
    assert mixed.dtype == dtype
    assert_close(mixed, one_by_one(model, x, names), atol=2e-2 if dtype == torch.bfloat16 else 1e-10)


def test_tied_layers() -> None:
    """The head follows the embedding: it uses the embedding's factors for each sample."""
    settings = {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tied=True), LoraConfig(r=2, **settings), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, **settings))
    randomise(model)
    model.eval()
    names = ["b", "a", "__base__", "b"]
    x = token_ids(4)
    assert_close(logits(model, x, adapter_names=names), one_by_one(model, x, names))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generating(options: dict) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, task_type="CAUSAL_LM"))
    randomise(model)
    model.eval()
    names, x = ["a", "__base__", "b"], token_ids(3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    for i, name in enumerate(names):
        count = options.get("num_return_sequences", 1)
        rows = mixed[i * count : (i + 1) * count]
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=x[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=x[i : i + 1], **options)
        assert_equal(rows, alone)
