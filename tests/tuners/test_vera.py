# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
VeRA: the math, and projections that all layers share and that come from a seed.

The expected outputs are computed from vectors and projections, as the paper writes them.
"""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    files_below,
    kinds,
    linears,
    llama,
    logits,
    randomise,
    refused,
    snapshot,
    token_ids,
    trainable,
    warned,
)
from torch import nn

from peft import (
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.vera import VeraModel


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    # said by every config that leaves them out; see test_leaving_projections_out_is_said
    pytest.mark.filterwarnings("ignore:save_projection=False:peft.utils.warning.PeftWarning"),
]


def adapted(base: nn.Module, *targets: str, name: str = "default", **fields: object) -> PeftModel:
    """VeRA with vectors that have an effect."""
    model = get_peft_model(base, VeraConfig(**{"r": 3, "target_modules": list(targets), **fields}), adapter_name=name)
    randomise(model, "vera_lambda_")
    return model.eval()


def test_math() -> None:
    """Layers of all sizes use the corners of one pair of projections, whichever way round they keep their weights."""
    base = kinds()
    model = adapted(base, "conv", "lin", "head")
    a, b = (model.base_model._modules[name]["default"] for name in ("vera_A", "vera_B"))
    assert (a.shape, b.shape) == ((3, 10), (10, 3))
    for layer, weight in ((base.conv, base.conv.weight.T), (base.lin, base.lin.weight), (base.head, base.head.weight)):
        weight = weight.clone()  # merging changes it in place
        out, into = weight.shape
        vectors = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        delta = torch.diag(vectors[0]) @ b[:out] @ torch.diag(vectors[1]) @ a[:, :into]
        x = torch.randn(2, 5, into)
        bias = 0 if layer.bias is None else layer.bias
        assert_close(layer(x), x @ (weight + delta).T + bias)
        layer.merge()
        assert_close(layer(x), x @ (weight + delta).T + bias)
        layer.unmerge()


def test_fresh_adapter() -> None:
    """It changes nothing, and its vectors are all that is trained."""
    base = linears(4, 6, 2)
    x = torch.randn(3, 4)
    expected = base(x)
    model = get_peft_model(base, VeraConfig(r=3, target_modules=["0", "1"], d_initial=0.5))
    assert_equal(model(x), expected)
    assert_equal(base[0].vera_lambda_d["default"], torch.full((3,), 0.5))
    assert trainable(model) == {f"base_model.model.{i}.vera_lambda_{v}.default" for i in range(2) for v in "bd"}


def test_dropout_is_for_training_only() -> None:
    """In training, inputs of the projections are dropped."""
    model = adapted(linears(4, 4), "0", vera_dropout=0.5)
    x = torch.ones(2, 4)
    assert_equal(model(x), model(x))
    model.train()
    assert differs(model(x), model.eval()(x))


# ------------------------------------------------------------------------------------------ projections
def test_drawn_from_the_seed() -> None:
    """First A, then B, uniformly within the bound of He et al., from a generator of their own."""
    base = linears(4, 6, 2)
    state = torch.get_rng_state()
    model = VeraModel(base, VeraConfig(r=3, target_modules=["0", "1"], projection_prng_key=7), "default")
    generator = torch.Generator().manual_seed(7)
    for drawn, fan_in in ((model.vera_A["default"], 6), (model.vera_B["default"], 3)):
        bound = (6 / fan_in) ** 0.5
        assert_equal(drawn, torch.empty(drawn.shape, device="cpu").uniform_(-bound, bound, generator=generator))
    assert torch.equal(torch.get_rng_state(), state)


def test_one_object_for_all_layers() -> None:
    """Tuner and layers hold the same module, and go on doing so in copies, pickles and on other devices."""
    model = adapted(linears(4, 6, 2), "0", "1")
    through_pickle = pickle.loads(pickle.dumps(model))
    for again in (model, copy.deepcopy(model), through_pickle, copy.deepcopy(model).double()):
        layers = again.get_base_model()
        for name in ("vera_A", "vera_B"):
            assert layers[0]._modules[name] is layers[1]._modules[name] is again.base_model._modules[name]
    assert_equal(through_pickle(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_pickle_holds_projections_once() -> None:
    """A file grows by the vectors of a layer, not by projections."""

    def size(layers: int) -> int:
        file = io.BytesIO()
        model = adapted(linears(*[64] * (layers + 1)), *map(str, range(layers)), r=64)
        vectors_and_base = sum(p.nbytes for p in model.parameters())
        torch.save(model, file)
        return file.tell() - vectors_and_base

    one_projection = 64 * 64 * 4
    assert size(4) - size(2) < one_projection


def test_keys() -> None:
    """In a checkpoint the projections stand once, in the model with every layer."""
    model = adapted(linears(4, 6, 2), "0", "1")
    vectors = {f"base_model.model.{i}.vera_lambda_{v}" for i in range(2) for v in "bd"}
    assert set(get_peft_model_state_dict(model)) == vectors | {"base_model.vera_A", "base_model.vera_B"}
    live = {key for key in model.state_dict() if "vera_A" in key}
    assert live == {f"base_model.{where}vera_A.default" for where in ("", "model.0.", "model.1.")}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_projections_are_loaded(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """The values of the file are used, not those of the seed."""
    model = adapted(linears(4, 6, 2), "0", "1")
    model.base_model.vera_A["default"].mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))
    assert not any(tensor.is_meta for tensor in again.state_dict().values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_projections_left_out(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """They are in no file and in no state dict; the seed gives them back."""
    model = adapted(linears(4, 6, 2), "0", "1", save_projection=False, projection_prng_key=3)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "vera_lambda" not in key]
    assert not [key for key in model.state_dict() if "vera_A" in key]
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))


def test_leaving_projections_out_is_said() -> None:
    """Files then depend on the random numbers of torch."""
    with warned("save_projection=False", "projection_prng_key"):
        VeraConfig(save_projection=False)


def test_projections_missing_in_a_file(tmp_path: Path) -> None:
    """They are drawn from the seed, and that is said."""
    model = adapted(linears(4, 6, 2), "0", "1")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "vera_A" not in key}, file)
    with warned("base_model.vera_A"):
        again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path, low_cpu_mem_usage=True)
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))


def test_nothing_is_reported_missing() -> None:
    """The names under which layers hold the projections count as loaded with them."""
    model = adapted(linears(4, 6, 2), "0", "1")
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert not [key for key in result.missing_keys if "vera" in key]
    assert not result.unexpected_keys


def test_half_precision() -> None:
    """Projections are rounded to the type of the base, as the released package does, and kept in float32."""
    a = adapted(linears(4, 6), "0").base_model.vera_A["default"]
    half = adapted(linears(4, 6).bfloat16(), "0").base_model.vera_A["default"]
    assert half.dtype == torch.float32
    assert_equal(half, a.bfloat16().float())


# ------------------------------------------------------------------------------------------ several adapters
def test_second_adapter_with_larger_layers(tmp_path: Path) -> None:
    """Each adapter has projections that fit its own layers, so it loads by itself as well."""
    base = linears(4, 6, 2)
    model = adapted(base, "1", name="one")
    model.add_adapter("two", VeraConfig(r=5, target_modules=["0", "1"]))
    randomise(model, "two", seed=3)
    x = torch.randn(3, 4)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path / name)
        assert_equal(again(x), outputs[name])
    again.load_adapter(tmp_path / "one", "one")
    again.set_adapter("one")
    assert_equal(again(x), outputs["one"])


def test_equal_projections_are_one(tmp_path: Path) -> None:
    """Another adapter of that rank needs no more memory for them, also on its way through files, copies and types."""
    base = linears(4, 6, 2)
    model = adapted(base, "0", name="one")
    model.add_adapter("two", VeraConfig(r=3, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(linears(4, 6, 2), tmp_path / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two", "two")
    for copied in (model, again, copy.deepcopy(model), copy.deepcopy(model).double()):
        layer = copied.get_base_model()[0]
        assert layer.vera_A["one"] is layer.vera_A["two"] and layer.vera_B["one"] is layer.vera_B["two"]
    with warned("'two' is active now"):
        again.delete_adapter("one")
    assert list(again.base_model.vera_A) == ["two"]


@pytest.mark.parametrize("whole", [False, True])
def test_other_values_for_one_adapter_are_its_own(whole: bool) -> None:
    """Projections of another origin are loaded without a change to those of the other adapters."""
    model = adapted(linears(4, 6, 2), "0", name="one")
    model.add_adapter("two", VeraConfig(r=3, target_modules=["0"]))
    layer = model.get_base_model()[0]
    before, other = layer.vera_A["one"].clone(), torch.randn_like(layer.vera_A["one"])
    if whole:
        state = model.state_dict()
        model.load_state_dict({key: other if key.endswith("vera_A.two") else state[key].clone() for key in state})
    else:
        state = get_peft_model_state_dict(model, adapter_name="two")
        state["base_model.vera_A"] = other
        set_peft_model_state_dict(model, state, adapter_name="two")
    assert_equal(layer.vera_A["one"], before)
    assert_equal(layer.vera_A["two"], other)
    assert layer.vera_B["one"] is layer.vera_B["two"]


def test_delete_adapter() -> None:
    """Its projections go with it, those of others stay."""
    base = linears(4, 6, 2)
    model = adapted(base, "0", name="one")
    model.add_adapter("two", VeraConfig(r=3, target_modules=["1"]))
    with warned("'two' is active now"):
        model.delete_adapter("one")
    assert list(model.base_model.vera_A) == list(base[1].vera_A) == ["two"]
    assert not [key for key in model.state_dict() if ".one" in key]


@pytest.mark.parametrize("fields", [{"projection_prng_key": 1}, {"save_projection": False}])
def test_adapters_that_do_not_fit_each_other(fields: dict) -> None:
    """Seed and saving of projections are the same for all adapters."""
    model = adapted(linears(4, 6, 2), "0")
    with refused(model, ValueError, next(iter(fields)), "'two'"):
        model.add_adapter("two", VeraConfig(r=3, target_modules=["0"], **fields))


def test_refused_halfway_leaves_nothing_behind() -> None:
    """A target that cannot be adapted, behind one that can: no vectors, no projections."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    with refused(base, ValueError, "'1'", "Conv1d"):
        get_peft_model(base, VeraConfig(r=3, target_modules=["0", "1"]))
    model = adapted(base, "0")
    with refused(model, ValueError, "'1'"):
        model.add_adapter("two", VeraConfig(r=3, target_modules=["0", "1"]))
    assert list(model.base_model.vera_A) == ["default"]


@pytest.mark.parametrize("r", [0, -1, 2.5])
def test_rank(r: object) -> None:
    """It is a positive integer."""
    base = linears(4, 4)
    with refused(base, ValueError, "rank r"):
        get_peft_model(base, VeraConfig(r=r, target_modules=["0"]))


def test_biases() -> None:
    """They can be those of adapted layers."""
    model = adapted(linears(4, 6, 2), "0", bias="vera_only")
    assert "base_model.model.0.base_layer.bias" in trainable(model)
    assert "base_model.model.1.bias" not in trainable(model)


# ------------------------------------------------------------------------------------------ without a PeftModel
def test_injection() -> None:
    """Layers share their projections without a tuner around them; a second injection finds them."""
    base = inject_adapter_in_model(VeraConfig(r=3, target_modules=["0", "1"], init_weights=False), linears(4, 6, 2))
    assert base[0].vera_A is base[1].vera_A
    tensors = get_peft_model_state_dict(base)
    assert {"vera_A", "vera_B", "0.vera_lambda_b"} < set(tensors)
    x = torch.randn(3, 4)
    other = linears(4, 6, 2)
    inject_adapter_in_model(VeraConfig(r=3, target_modules=["0", "1"]), other, state_dict=tensors)
    tensors["vera_A"] = tensors["vera_A"] + 0.5
    set_peft_model_state_dict(other, tensors)
    assert_equal(other[1].vera_A["default"], tensors["vera_A"])
    assert differs(other(x), base(x))
    set_peft_model_state_dict(base, tensors)
    assert_equal(other(x), base(x))


def test_meta_device() -> None:
    """Vectors are made without storage; what is drawn is there."""
    base = inject_adapter_in_model(VeraConfig(r=3, target_modules=["0"]), linears(4, 6), low_cpu_mem_usage=True)
    assert base[0].vera_lambda_b["default"].is_meta
    assert not base[0].vera_A["default"].is_meta


def test_tied_layers() -> None:
    """An embedding follows the head that it shares the weight with."""
    base = llama(tied=True)
    model = adapted(base, "lm_head", ensure_weight_tying=True)
    assert len(trainable(model)) == 2
    weight = base.lm_head.base_layer.weight + base.lm_head.get_delta_weight("default")
    assert_close(base.model.embed_tokens(token_ids()), weight[token_ids()])
    expected = logits(model, token_ids())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    """Twice the same file, and the model as before."""
    model = adapted(linears(4, 6, 2), "0", "1")
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    first = files_below(tmp_path)
    model.save_pretrained(tmp_path)
    assert files_below(tmp_path) == first
    assert snapshot(model) == before
