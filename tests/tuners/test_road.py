# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RoAd against the matrices of single pairs, its starts, and outputs that cannot be turned back."""

import math

import pytest
import torch
from torch import nn

from peft import RoadConfig, get_peft_model
from peft.tuners.road.layer import RoadLayer


def adapted(net: nn.Sequential, **fields: object) -> RoadLayer:
    get_peft_model(net, RoadConfig(**{"target_modules": ["0"], "group_size": 4, "init_weights": False, **fields}))
    return net[0]


def matrix(layer: RoadLayer) -> torch.Tensor:
    """Write the matrix that outputs are multiplied by down, pair by pair."""
    theta, alpha = layer.road_theta["default"].tolist(), layer.road_alpha["default"].tolist()
    variant, g = layer.variant["default"], layer.group_size["default"]
    m = torch.zeros(layer.out_features, layer.out_features)
    for group in range(layer.out_features // g):
        for k in range(g // 2):
            first, second = group * g + k, group * g + k + g // 2
            if variant == "road_1":
                cosines = sines = (group * g // 2 + k,) * 2
            elif variant == "road_2":
                cosines = sines = first, second
            else:
                start = group * 2 * g
                cosines = start + k, start + k + g // 2
                sines = start + g + k, start + g + k + g // 2
            m[first, first], m[second, second] = (alpha[i] * math.cos(theta[i]) for i in cosines)
            m[first, second], m[second, first] = (
                sign * alpha[i] * math.sin(theta[i]) for sign, i in zip((-1, 1), sines, strict=True)
            )
    return m


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_outputs_are_turned_in_pairs(variant: str) -> None:
    layer, x = adapted(nn.Sequential(nn.Linear(6, 8)), variant=variant), torch.randn(3, 6)
    base = layer.base_layer
    m, weight, bias = matrix(layer), base.weight.detach().clone(), base.bias.detach().clone()
    torch.testing.assert_close(layer(x), (x @ weight.T + bias) @ m.T)
    layer.merge()
    torch.testing.assert_close(base.weight, m @ weight)
    torch.testing.assert_close(base.bias, m @ bias)
    layer.unmerge()
    torch.testing.assert_close(base.weight, weight, atol=1e-5, rtol=1e-4)
    assert torch.equal(base.bias, bias)


def test_a_pair_that_has_become_a_line_is_brought_back() -> None:
    layer = adapted(nn.Sequential(nn.Linear(6, 8)))
    weight = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.road_alpha["default"][0] = 0.0
    assert not layer.can_unmerge("default")
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_adapters_turn_one_after_the_other() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    config = RoadConfig(target_modules=["0"], group_size=4, init_weights=False)
    model = get_peft_model(net, config)
    model.add_adapter("other", RoadConfig(target_modules=["0"], group_size=8, init_weights=False))
    expected = net[0].base_layer(x)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = expected @ net[0].mixed(name, torch.eye(8))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_starts() -> None:
    net = nn.Sequential(nn.Linear(6, 8))
    torch.manual_seed(0)
    layer = adapted(net)
    torch.manual_seed(0)
    assert torch.equal(layer.road_theta["default"], torch.empty(4).normal_(0, 0.5))
    assert torch.equal(layer.road_alpha["default"], torch.empty(4).normal_(1, 0.5))
    layer.reset_parameters("default", True)
    assert not layer.road_theta["default"].any() and (layer.road_alpha["default"] == 1).all()


def test_groups_that_do_not_divide_the_outputs_are_refused() -> None:
    base = nn.Linear(6, 10)
    net = nn.Sequential(base)
    with pytest.raises(ValueError, match="group_size=4.*10"):
        adapted(net)
    assert net[0] is base


@pytest.mark.parametrize("fields", [{"variant": "road_3"}, {"group_size": 3}, {"group_size": 0}])
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        RoadConfig(**fields)
