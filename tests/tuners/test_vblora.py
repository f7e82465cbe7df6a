# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
VB-LoRA: factors out of a vector bank, and the short form of checkpoints.

The expected factors are put together piece by piece, as the paper writes them.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    kinds,
    linears,
    llama,
    logits,
    randomise,
    refused,
    token_ids,
    trainable,
    warned,
)
from torch import nn

from peft import (
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.vblora.maths import NOT_SAVED, TopkForm


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def adapted(base: nn.Module, *targets: str, name: str = "default", **fields: object) -> PeftModel:
    """VB-LoRA with logits and vectors that have an effect."""
    config = {"r": 3, "num_vectors": 7, "vector_length": 2, "target_modules": list(targets), **fields}
    config["fan_in_fan_out"] = targets == ("conv",)
    model = get_peft_model(base, VBLoRAConfig(**config), adapter_name=name).eval()
    randomise(model, "vblora_")
    return model


def mixture(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """One piece: the vectors of the greatest logits, weighted by their softmax."""
    chosen = sorted(range(len(logits)), key=lambda i: -logits[i])[:topk]
    weights = torch.tensor([logits[i].exp() for i in chosen])
    return sum(w * bank[i] for w, i in zip(weights / weights.sum(), chosen, strict=True))


@pytest.mark.parametrize("topk", [1, 2, 7])
@pytest.mark.parametrize("name", ["conv", "lin"])
@torch.no_grad()
def test_math(name: str, topk: int) -> None:
    """Rows of A and columns of B are pieces in a row."""
    base = kinds()
    adapted(base, name, topk=topk)
    layer = getattr(base, name)
    weight = layer.weight.T if name == "conv" else layer.weight
    bank = layer.vblora_vector_bank["default"]
    rows = [torch.cat([mixture(p, bank, topk) for p in row]) for row in layer.vblora_logits_A["default"]]
    columns = [torch.cat([mixture(p, bank, topk) for p in c]) for c in layer.vblora_logits_B["default"].unbind(1)]
    expected = weight + torch.stack(columns, dim=1) @ torch.stack(rows)
    x = torch.randn(2, 5, weight.shape[1])
    assert_close(layer(x), x @ expected.T + layer.bias)
    layer.merge()
    assert_close(layer(x), x @ expected.T + layer.bias)


def test_start() -> None:
    """Logits and bank are drawn as the config says; bank and logits are trained."""
    model = get_peft_model(
        linears(64, 64),
        VBLoRAConfig(vector_length=4, target_modules=["0"], init_vector_bank_bound=0.5, init_logits_std=2.0),
    )
    layer = model.get_base_model()[0]
    bank, logits_a = layer.vblora_vector_bank["default"], layer.vblora_logits_A["default"]
    assert 0.45 < bank.abs().max() <= 0.5
    assert 1.9 < logits_a.std() < 2.1
    assert {name.split(".")[-2] for name in trainable(model)} == {
        "vblora_logits_A",
        "vblora_logits_B",
        "vblora_vector_bank",
    }
    model(torch.randn(2, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_bank() -> None:
    """All layers train the same vectors, also in copies; an optimiser sees them once."""
    model = adapted(linears(4, 6, 2), "0", "1")
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = again.get_base_model()
        bank = again.base_model.vblora_vector_bank
        assert layers[0].vblora_vector_bank is layers[1].vblora_vector_bank is bank
        assert len([p for p in again.parameters() if p is bank["default"]]) == 1
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 7 * 2 + 7 * 3 * (2 + 3 + 3 + 1)
    assert total == trained + 4 * 6 + 6 + 6 * 2 + 2


def test_several_adapters(tmp_path: Path) -> None:
    """Each has a bank of its own, of its own size."""
    base = linears(4, 6, 2)
    model = adapted(base, "0", name="one")
    model.add_adapter("two", VBLoRAConfig(r=2, num_vectors=5, vector_length=1, target_modules=["1"]))
    x = torch.randn(3, 4)
    first = model(x)
    model.base_model.set_adapter(["one", "two"])
    delta = base[1].get_delta_weight("two")
    assert_close(model(x), first + (base[0](x)) @ delta.T)
    model.set_adapter("one")
    assert not base[1].vblora_vector_bank["two"].requires_grad
    model.save_pretrained(tmp_path)
    with warned("'two' is active now"):
        model.delete_adapter("one")
    assert list(base[1].vblora_vector_bank) == ["two"]
    assert_equal(PeftModel.from_pretrained(linears(4, 6, 2), tmp_path / "one")(x), first)


# ------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_whole_form(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """Logits of each layer, and one bank."""
    model = adapted(linears(4, 6, 2), "0", "1")
    model.save_pretrained(tmp_path)
    logits_ = {f"base_model.model.{i}.vblora_logits_{side}" for i in range(2) for side in "AB"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == logits_ | {"base_model.vblora_vector_bank"}
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_short_form(tmp_path: Path, topk: int, low_cpu_mem_usage: bool) -> None:
    """Weights, all but the last, and indices of the vectors that are mixed: enough to compute the same."""
    model = adapted(linears(4, 6, 2), "0", "1", topk=topk, save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.0.vblora_logits_A"
    assert key not in saved
    values, indices = model.get_base_model()[0].vblora_logits_A["default"].detach().topk(topk, dim=-1)
    assert_equal(saved[f"{key}_topk_indices"], indices.to(torch.uint8))
    assert_close(saved[f"{key}_topk_weights"], values.softmax(-1)[..., :-1])
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 4)
    assert_close(again(x), model(x))
    again.save_pretrained(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        assert_close(tensor, saved[name])


def test_short_form_has_no_training(tmp_path: Path) -> None:
    """What was left out would be missing; evaluation works."""
    model = adapted(linears(4, 6, 2), "0", "1", save_only_topk_weights=True)
    x = torch.randn(3, 4)
    model.train()(x).sum().backward()  # the adapter itself can be trained
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, is_trainable=True)
    with refused(None, RuntimeError, "save_only_topk_weights"):
        again.train()(x)
    assert_close(again.eval()(x), model.eval()(x))


def test_short_form_into_whole(tmp_path: Path) -> None:
    """A file of either form loads, whatever the config says about saving."""
    short = adapted(linears(4, 6, 2), "0", "1", save_only_topk_weights=True)
    whole = adapted(linears(4, 6, 2), "0", "1")
    randomise(whole, "vblora_", seed=5)
    result = set_peft_model_state_dict(whole, get_peft_model_state_dict(short))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "vblora" in key]
    x = torch.randn(3, 4)
    assert_close(whole(x), short(x))


@pytest.mark.parametrize(
    ("change", "classes", "mention"),
    [
        ({"_topk_indices": lambda t: t + 7}, ValueError, "bank"),
        ({"_topk_indices": lambda t: t[..., :1]}, RuntimeError, "one integer more"),
        ({"_topk_weights": lambda t: t * float("nan")}, ValueError, "not finite"),
        ({"_topk_weights": lambda t: t[:1], "_topk_indices": lambda t: t[:1]}, RuntimeError, "another shape"),
    ],
)
def test_damaged_short_form(change: dict, classes: type, mention: str) -> None:
    """It is refused before a tensor is changed."""
    model = adapted(linears(4, 6, 2), "0", "1", save_only_topk_weights=True)
    tensors = get_peft_model_state_dict(model)
    for ending, damage in change.items():
        key = f"base_model.model.0.vblora_logits_B{ending}"
        tensors[key] = damage(tensors[key])
    with refused(model, classes, mention):
        set_peft_model_state_dict(model, tensors)


def test_half_of_the_short_form() -> None:
    """Weights without indices belong to nothing."""
    model = adapted(linears(4, 6), "0", save_only_topk_weights=True)
    tensors = get_peft_model_state_dict(model)
    del tensors["base_model.model.0.vblora_logits_B_topk_indices"]
    result = set_peft_model_state_dict(model, tensors)
    assert result.unexpected_keys == ["base_model.model.0.vblora_logits_B_topk_weights"]
    assert "base_model.model.0.vblora_logits_B.default" in result.missing_keys


@pytest.mark.parametrize(
    ("vectors", "dtype"),
    [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32), (2**31, torch.int64)],
)
def test_type_of_indices(vectors: int, dtype: torch.dtype) -> None:
    """The smallest that can count the vectors, as in files of the released package."""
    assert TopkForm(2, vectors, True).index_dtype == dtype


def test_weight_that_vanishes() -> None:
    """A vector of no weight stays one when read back, and nothing becomes infinite."""
    form = TopkForm(2, 4, True)
    read = form.read(*form.write(torch.tensor([[0.0, 500.0, -3.0, -2.0]])))
    assert read.isfinite().all()
    assert (read == NOT_SAVED).sum() == 2
    assert_close(read.softmax(-1), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_bank_missing_in_a_file(tmp_path: Path) -> None:
    """It keeps its start values, and that is said."""
    adapted(linears(4, 6), "0").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "bank" not in key}, file)
    with warned("base_model.vblora_vector_bank"):
        again = PeftModel.from_pretrained(linears(4, 6), tmp_path, low_cpu_mem_usage=True)
    assert not again.base_model.vblora_vector_bank["default"].is_meta


# ------------------------------------------------------------------------------------------ counting
def test_savable_parameters(capsys: pytest.CaptureFixture) -> None:
    """What release 0.21.2 counts for these sizes, in units of 4 bytes."""
    fields = {"r": 2, "num_vectors": 6, "vector_length": 2}
    model = adapted(linears(4, 6, 2), "0", "1", bias="all", **fields)
    assert model.get_nb_savable_parameters() == (120, 8)
    model.print_savable_parameters()
    assert "120 || all parameters to save: 128" in capsys.readouterr().out
    for topk, count in ((1, 16), (2, 39), (3, 61)):
        short = adapted(linears(4, 6, 2), "0", "1", save_only_topk_weights=True, **{**fields, "topk": topk})
        assert short.get_nb_savable_parameters() == (count, 0)
    with refused(None, ValueError, "'none'"):
        model.get_nb_savable_parameters("none")


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"vector_length": 4}, "vector_length=4"),
        ({"vector_length": 0}, "vector_length"),
        ({"topk": 8}, "topk=8"),
        ({"topk": 0}, "topk"),
        ({"r": 0}, "r must"),
        ({"num_vectors": 1.5}, "num_vectors"),
        ({"init_vector_bank_bound": -1.0}, "init_vector_bank_bound"),
        ({"target_modules": ["0", "conv"]}, "'conv'"),
    ],
)
def test_refusals(fields: dict, mention: str) -> None:
    """Nothing is left behind, neither in a bare model nor in one that has an adapter."""
    config = {"r": 3, "num_vectors": 7, "vector_length": 2, "target_modules": ["0", "1"], **fields}
    base = linears(4, 6, 2)
    base.add_module("conv", nn.Conv1d(2, 2, 1))
    with refused(base, ValueError, mention):
        get_peft_model(base, VBLoRAConfig(**config))
    model = adapted(base, "0")
    with refused(model, ValueError, mention):
        model.add_adapter("two", VBLoRAConfig(**config))
    assert list(model.base_model.vblora_vector_bank) == ["default"]


def test_injection() -> None:
    """Layers share the bank without a tuner around them, and files go in and out."""
    config = VBLoRAConfig(r=3, num_vectors=7, vector_length=2, target_modules=["0", "1"])
    base = inject_adapter_in_model(config, linears(4, 6, 2))
    assert base[0].vblora_vector_bank is base[1].vblora_vector_bank
    randomise(base, "vblora_")
    tensors = get_peft_model_state_dict(base)
    other = inject_adapter_in_model(config, linears(4, 6, 2), state_dict=tensors)
    x = torch.randn(3, 4)
    assert differs(other(x), base(x))
    set_peft_model_state_dict(other, tensors)
    assert_equal(other(x), base(x))


@pytest.mark.parametrize("short", [False, True])
def test_tied_layers(tmp_path: Path, short: bool) -> None:
    """An embedding follows the head that it shares the weight with, in either form of a file."""
    base = llama(tied=True)
    fields = {"ensure_weight_tying": True, "save_only_topk_weights": short}
    model = adapted(base, "lm_head", **fields)
    assert len(trainable(model)) == 3
    expected = logits(model, token_ids())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied=True), tmp_path)
    assert_close(logits(again, token_ids()), expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)
