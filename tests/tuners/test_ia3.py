# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
IA3: factors on inputs and outputs, which of the two a layer gets, and the weighted sum of adapters.

The expected outputs are computed from the base layer's weight, as the paper writes them.
"""

from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    gpt2,
    kinds,
    llama,
    logits,
    randomise,
    refused,
    snapshot,
    token_ids,
    warned,
)
from torch import nn

from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3 import Conv2d, Conv3d, Linear


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

SIZES = {"emb": 12, "conv": (8, 10), "lin": (10, 6), "head": (6, 4)}


def adapted(net: nn.Module, targets: list[str], feedforward: list[str], **fields: object) -> PeftModel:
    """IA3 with random factors."""
    fields = {"init_ia3_weights": False, "fan_in_fan_out": targets == ["conv"], **fields}
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, **fields)
    return get_peft_model(net, config, adapter_name="one").eval()


def by_hand(base: nn.Linear, x: torch.Tensor, factors: torch.Tensor, of_inputs: bool) -> torch.Tensor:
    """What the paper says: the features that go in, or those that come out, times the factors."""
    return base(x * factors.flatten()) if of_inputs else base(x) * factors.flatten()


# ------------------------------------------------------------------------------------------ the math
@pytest.mark.parametrize("name", ["conv", "lin"])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_linear_layers(name: str, of_inputs: bool) -> None:
    """A linear layer, with bias, whichever way round it keeps its weight."""
    net = kinds()
    adapted(net, [name], [name] if of_inputs else [])
    layer = getattr(net, name)
    into, out = SIZES[name]
    assert type(layer) is Linear
    assert layer.ia3_l["one"].shape == ((1, into) if of_inputs else (out, 1))
    x = torch.randn(3, 5, into)
    assert_close(layer(x), by_hand(layer.base_layer, x, layer.ia3_l["one"], of_inputs))


@pytest.mark.parametrize("of_inputs", [True, False])
@pytest.mark.parametrize(
    ("base", "layer_cls", "space"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), Conv2d, (5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, bias=False), Conv2d, (9, 9)),
        (nn.Conv3d(4, 6, 2), Conv3d, (3, 4, 3)),
    ],
)
def test_convolutions(base: nn.Module, layer_cls: type, space: tuple[int, ...], of_inputs: bool) -> None:
    """A factor per channel; merging finds the channels of each group."""
    net = nn.Sequential(base)
    adapted(net, ["0"], ["0"] if of_inputs else [])
    layer, x = net[0], torch.randn(2, 4, *space)
    channels = 4 if of_inputs else 6
    ones = [1] * len(space)
    assert type(layer) is layer_cls
    assert layer.ia3_l["one"].shape == (1, channels, *ones)
    factors = layer.ia3_l["one"]
    expected = base(x * factors) if of_inputs else base(x) * factors
    assert_close(layer(x), expected)
    layer.merge()
    assert_close(layer(x), expected)


def test_fresh_adapter_changes_nothing() -> None:
    """Factors start at 1."""
    net = llama()
    expected = logits(net, token_ids())
    model = get_peft_model(net, IA3Config())
    assert_equal(logits(model, token_ids()), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_back(make: object) -> None:
    """The merged model computes the same; unmerging gives the weights back."""
    net = make()
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    model = get_peft_model(net, IA3Config(fan_in_fan_out=make is gpt2)).eval()
    randomise(model, "ia3_")
    expected = logits(model, token_ids())
    model.merge_adapter()
    assert_close(logits(model, token_ids()), expected)
    model.unmerge_adapter()
    for name, parameter in model.get_base_model().named_parameters():
        if "ia3_" not in name:
            assert_close(parameter, before[name.replace(".base_layer", "")])
    assert_close(logits(model.merge_and_unload(), token_ids()), expected)


def test_factor_of_zero_can_be_unmerged() -> None:
    """What was multiplied by zero comes back, since a copy is kept."""
    net = kinds()
    model = adapted(net, ["lin"], [])
    weight, bias = net.lin.weight.clone(), net.lin.bias.clone()
    nn.init.zeros_(net.lin.ia3_l["one"])
    model.merge_adapter()
    assert not net.lin.weight.any()
    model.unmerge_adapter()
    assert_equal(net.lin.weight, weight)
    assert_equal(net.lin.bias, bias)


def test_two_active_adapters() -> None:
    """Factors of both are multiplied, also where one scales inputs and the other one outputs."""
    net = kinds()
    model = adapted(net, ["lin"], [])
    model.add_adapter("two", IA3Config(target_modules=["lin"], feedforward_modules=["lin"], init_ia3_weights=False))
    model.base_model.set_adapter(["one", "two"])
    layer, x = net.lin, torch.randn(3, 10)
    expected = layer.base_layer(x * layer.ia3_l["two"].flatten()) * layer.ia3_l["one"].flatten()
    assert_close(layer(x), expected)
    layer.merge()
    assert_close(layer(x), expected)


def test_mixed_batch() -> None:
    """Each sample gets the factors of its adapter."""
    net = kinds()
    model = adapted(net, ["lin", "head"], ["head"])
    config = IA3Config(target_modules=["conv"], feedforward_modules=[], init_ia3_weights=False, fan_in_fan_out=True)
    model.add_adapter("two", config)
    ids = torch.randint(0, 12, (3, 4))
    mixed = logits(model, ids, adapter_names=["two", "__base__", "one"])
    for row, name in enumerate(["two", None, "one"]):
        if name is None:
            with model.disable_adapter():
                expected = logits(model, ids)
        else:
            model.set_adapter(name)
            expected = logits(model, ids)
        assert_close(mixed[row], expected[row])


# ------------------------------------------------------------------------------------------ which side
@pytest.mark.parametrize(
    ("fields", "of_inputs"),
    [
        ({}, {"k_proj": False, "v_proj": False, "down_proj": True}),
        ({"target_modules": ["q_proj", "down_proj"]}, {"q_proj": False, "down_proj": True}),
        (
            {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []},
            {"q_proj": False, "down_proj": False},
        ),
        (
            {"target_modules": r".*\.(q_proj|up_proj)", "feedforward_modules": r".*up_proj"},
            {"q_proj": False, "up_proj": True},
        ),
    ],
)
def test_feedforward_modules(fields: dict, of_inputs: dict[str, bool]) -> None:
    """They are what the config says, or the default of the model type."""
    net = llama()
    model = get_peft_model(net, IA3Config(**fields))
    sides = {
        name.rpartition(".")[2]: module.is_feedforward["default"]
        for name, module in net.named_modules()
        if hasattr(module, "ia3_l")
    }
    assert sides == of_inputs
    assert model.peft_config["default"].feedforward_modules is not None


def test_feedforward_has_to_be_said() -> None:
    """A model type without defaults needs the answer."""
    net = kinds()
    with refused(net, ValueError, "feedforward_modules", "empty list"):
        get_peft_model(net, IA3Config(target_modules=["lin"]))


def test_feedforward_outside_targets() -> None:
    """Only a target can be scaled."""
    with pytest.raises(ValueError, match="feedforward_modules has other"):
        IA3Config(target_modules=["lin"], feedforward_modules=["other"])


def test_unsupported_layer() -> None:
    """An embedding has no factors."""
    net = kinds()
    with refused(net, ValueError, "'emb'", "Embedding"):
        get_peft_model(net, IA3Config(target_modules=["emb"], feedforward_modules=[]))


# ------------------------------------------------------------------------------------------ weighted sums
def test_add_weighted_adapter() -> None:
    """The factors are the weighted sum; a layer that lacks an adapter has factors of 1 for it."""
    net = kinds()
    model = adapted(net, ["lin"], [])
    config = IA3Config(target_modules=["lin", "head"], feedforward_modules=["head"], init_ia3_weights=False)
    model.add_adapter("two", config)
    model.add_weighted_adapter(["one", "two"], [0.25, 0.5], "sum")
    assert model.active_adapters == ["one"]
    assert model.peft_config["sum"].target_modules == {"lin", "head"}
    assert_close(net.lin.ia3_l["sum"], 0.25 * net.lin.ia3_l["one"] + 0.5 * net.lin.ia3_l["two"])
    assert_close(net.head.ia3_l["sum"], 0.25 + 0.5 * net.head.ia3_l["two"])
    assert net.head.is_feedforward["sum"]


def test_add_weighted_adapter_refuses() -> None:
    """Whatever cannot be summed leaves the model as it was."""
    net = kinds()
    model = adapted(net, ["lin"], [])
    model.add_adapter("two", IA3Config(target_modules=["lin"], feedforward_modules=["lin"]))
    model.add_adapter("three", IA3Config(target_modules="lin", feedforward_modules=[]))
    for adapters, weights, mention in (
        (["one", "none"], [1, 1], "'none'"),
        (["one", "two"], [1], "one per adapter"),
        (["one", "two"], [1, float("nan")], "finite"),
        ([], [], "one per adapter"),
        (["one", "two"], [1, 1], "feedforward_modules"),
        (["one", "three"], [1, 1], "target_modules"),
    ):
        with refused(model, ValueError, mention):
            model.add_weighted_adapter(adapters, weights, "sum")
    before = snapshot(model)
    with warned("'two'"):
        model.add_weighted_adapter(["one"], [1.0], "two")
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------ files, ties
def test_save_and_load(tmp_path: Path) -> None:
    """Keys have no adapter name, and the loaded model computes the same."""
    model = adapted(kinds(), ["lin", "conv"], ["conv"])
    ids = torch.randint(0, 12, (2, 4))
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    again = PeftModel.from_pretrained(kinds(), tmp_path / "one", low_cpu_mem_usage=True)
    assert_equal(logits(again, ids), logits(model, ids))


def test_tied_layers() -> None:
    """An embedding that shares the weight of a scaled head follows it."""
    net = llama(tied=True)
    config = IA3Config(
        target_modules=["lm_head"], feedforward_modules=[], init_ia3_weights=False, ensure_weight_tying=True
    )
    model = get_peft_model(net, config).eval()
    factors = net.lm_head.ia3_l["default"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.lm_head.ia3_l.default"
    ]
    weight = net.lm_head.base_layer.weight
    assert_close(net.model.embed_tokens(token_ids()), (weight * factors)[token_ids()])
    expected = logits(model, token_ids())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)
