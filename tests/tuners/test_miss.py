# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""MiSS against matrices that are written down entry by entry."""

import warnings

import pytest
import torch
from torch import nn

from peft import MissConfig, get_peft_model
from peft.tuners.miss.layer import MissLayer
from peft.tuners.miss.maths import change_of, without_change


def adapted(base: nn.Module, **fields: object) -> MissLayer:
    net = nn.Sequential(base)
    get_peft_model(net, MissConfig(**{"target_modules": ["0"], "r": 4, **fields}))
    layer = net[0]
    nn.init.normal_(layer.miss_block["default"], std=0.3)
    return layer


def weight_by_hand(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Compute the adapted weight of any variant."""
    changed, r = weight.detach().clone(), block.shape[1] if block.dim() == 3 else block.shape[0]
    out, inputs = weight.shape
    for o in range(out):
        for i in range(inputs):
            if block.dim() == 2:
                changed[o, i] += block[i % r, o % block.shape[1]]
            else:
                start = i - i % r
                row = weight[o, start : start + r].detach()
                changed[o, i] += row @ block[o // r, :, i % r] + block[o // r, o % r, i % r]
    return changed


VARIANTS = [{}, {"r": 5}, {"init_weights": "mini", "mini_r": 2}, {"init_weights": "bat"}]


@pytest.mark.parametrize("fields", VARIANTS)
def test_variants(fields: dict) -> None:
    layer, x = adapted(nn.Linear(12, 8), **fields), torch.randn(2, 3, 12)
    block = layer.miss_block["default"].detach()
    expected = weight_by_hand(layer.base_layer.weight, block)
    y = x @ expected.T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, expected - layer.base_layer.weight, atol=1e-5, rtol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS)
def test_gradients(fields: dict) -> None:
    layer, x = adapted(nn.Linear(12, 8), **fields), torch.randn(3, 12)
    block = layer.miss_block["default"]
    found = torch.autograd.grad(layer(x).square().sum(), block)[0]
    y = x @ weight_by_hand(layer.base_layer.weight, block).T + layer.base_layer.bias
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), block)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", VARIANTS)
@pytest.mark.parametrize("second", VARIANTS)
def test_two_adapters_of_any_variants_follow_each_other(first: dict, second: dict) -> None:
    net, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(3, 12)
    model = get_peft_model(net, MissConfig(**{"target_modules": ["0"], "r": 4, **first}))
    model.add_adapter("other", MissConfig(**{"target_modules": ["0"], "r": 4, **second}))
    for block in net[0].miss_block.values():
        nn.init.normal_(block, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    weight = net[0].base_layer.weight.detach().clone()
    expected = weight
    for adapter in ("default", "other"):
        expected = weight_by_hand(expected, net[0].miss_block[adapter].detach())
    y = x @ expected.T + net[0].base_layer.bias
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(net[0].base_layer.weight, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(net[0].base_layer.weight, weight, atol=1e-5, rtol=1e-5)


def test_a_transformed_weight_comes_back_exactly() -> None:
    layer = adapted(nn.Linear(12, 8).bfloat16(), init_weights="bat")
    with torch.no_grad():
        layer.miss_block["default"][0].copy_(-torch.eye(4))  # what is singular has no inverse
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_half_precision_mini_merges_and_unmerges() -> None:
    net = nn.Sequential(nn.Linear(12, 8).bfloat16())
    config = MissConfig(r=4, init_weights="mini", mini_r=2, target_modules=["0"])
    get_peft_model(net, config, autocast_adapter_dtype=False)
    nn.init.normal_(net[0].miss_block["default"])
    expected = weight_by_hand(net[0].base_layer.weight.float(), net[0].miss_block["default"].float())
    net[0].merge()
    torch.testing.assert_close(net[0].base_layer.weight.float(), expected.detach(), atol=0.05, rtol=0.05)
    assert net[0].miss_block["default"].shape == (4, 2)
    net[0].unmerge()


def test_starts() -> None:
    base = nn.Linear(12, 8)
    torch.manual_seed(1)
    net = nn.Sequential(base)
    get_peft_model(net, MissConfig(target_modules=["0"], r=4, init_weights=False))
    torch.manual_seed(1)
    assert torch.equal(net[0].miss_block["default"], torch.empty(4, 8).uniform_(-(8**-0.5), 8**-0.5))
    torch.manual_seed(1)
    after = torch.rand(1)
    for fields in VARIANTS:
        net = nn.Sequential(base)
        torch.manual_seed(1)
        get_peft_model(net, MissConfig(**{"target_modules": ["0"], "r": 4, **fields}))
        assert not net[0].miss_block["default"].any()
        assert torch.equal(torch.rand(1), after)


def test_restarts_change_variant_and_size() -> None:
    layer = adapted(nn.Linear(12, 8))
    layer.merge()
    before = layer.weight_before_merge()
    layer.reset_bat_parameters("default", 2)
    assert layer.miss_block["default"].shape == (4, 2, 2)
    torch.testing.assert_close(layer.base_layer.weight, before)
    layer.unmerge()
    layer.reset_mini_parameters("default", 3, 4)
    assert layer.miss_block["default"].shape == (3, 4)
    assert (layer.miss_r["default"], layer.miss_mini_r["default"]) == (3, 4)
    layer.reset_miss_parameters("default", 6)
    assert layer.miss_block["default"].shape == (6, 8)
    assert not layer.miss_block["default"].any()
    assert layer.miss_block["default"].requires_grad
    layer.reset_miss_parameters_random("default")
    assert layer.miss_block["default"].any()


def test_weights_of_the_caller() -> None:
    layer, weight = adapted(nn.Linear(12, 8), init_weights="bat"), torch.randn(8, 12)
    changed = weight + layer.get_delta_weight("default", weight)
    torch.testing.assert_close(changed, weight_by_hand(weight, layer.miss_block["default"]))
    back = layer.get_delta_weight("default", changed, reverse=True)
    torch.testing.assert_close(back, weight, atol=1e-4, rtol=1e-4)
    layer = adapted(nn.Linear(12, 8))
    changed = layer.get_delta_weight_miss("default", weight)
    torch.testing.assert_close(changed, weight_by_hand(weight, layer.miss_block["default"]))
    torch.testing.assert_close(layer.get_delta_weight_miss("default", changed, reverse=True), weight)


def test_a_change_is_undone_in_half_precision() -> None:
    weight, blocks = torch.randn(8, 12).double(), torch.randn(2, 4, 4).double() * 0.1
    torch.testing.assert_close(without_change(weight + change_of(weight, blocks), blocks), weight)


def test_dropout() -> None:
    layer, x = adapted(nn.Linear(12, 8), r=5, miss_dropout=0.5), torch.randn(3, 12)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    expected = layer.base_layer(x) + dropped @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer.train()(x), expected)
    with pytest.warns(UserWarning, match="has no effect with init_weights='bat'"):
        MissConfig(init_weights="bat", miss_dropout=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be positive"),
        ({"r": 13}, "at most the 12 inputs"),
        ({"r": 3, "init_weights": "bat"}, "for 'bat' r must divide"),
        ({"init_weights": "mini", "mini_r": 3}, "mini_r must divide the 8 outputs"),
        ({"init_weights": "mini", "mini_r": 0}, "mini_r must divide the 8 outputs"),
    ],
)
def test_refused(fields: dict, message: str) -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, MissConfig(**{"target_modules": ["0"], "r": 4, **fields}))
    assert type(net[0]) is nn.Linear


def test_there_is_no_scale() -> None:
    layer, x = adapted(nn.Linear(12, 8)), torch.randn(3, 12)
    before = layer(x)
    for scaling in (lambda: layer.scale_layer(2.0), lambda: layer.unscale_layer(), lambda: layer.unscale_layer(0.5)):
        with pytest.warns(UserWarning, match="has no scale"):
            scaling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1)
    assert torch.equal(layer(x), before)
