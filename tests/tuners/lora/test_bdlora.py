# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BD-LoRA: the blocks of its factors, how they start, which targets get them, and what is refused."""

import math
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, features, randomise, refused, stack
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import BdLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import BlockDiagonalLinear


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def config(
    nblocks: int = 2, match_strict: bool = True, a: Any = ("0",), b: Any = ("1",), **changes: Any
) -> LoraConfig:
    lists = {"target_modules_bd_a": list(a), "target_modules_bd_b": list(b)}
    settings = BdLoraConfig(**lists, nblocks=nblocks, match_strict=match_strict)
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"], "use_bdlora": settings, **changes})


def two_layers(**changes: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
    get_peft_model(net, config(**changes))
    return net


def by_hand(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The matrix, entry by entry."""
    rows, columns = blocks.shape
    whole = torch.zeros(rows, columns * count)
    for i in range(rows):
        start = i // (rows // count) * columns
        whole[i, start : start + columns] = blocks[i]
    return whole


@pytest.mark.parametrize("nblocks", [1, 2])
def test_the_formula(nblocks: int) -> None:
    net, x = two_layers(nblocks=nblocks), features(3, 8)
    randomise(net)
    first, second = net
    a, b = first.lora_A["default"].weight, first.lora_B["default"].weight
    assert a.shape == (4, 8 // nblocks) and b.shape == (6, 4)
    delta = 2 * b @ by_hand(a, nblocks)
    assert_close(first.get_delta_weight("default"), delta)
    assert_close(first(x), x @ (first.weight + delta).T + first.bias)
    a, b = second.lora_A["default"].weight, second.lora_B["default"].weight
    assert a.shape == (4, 6) and b.shape == (10, 4 // nblocks)
    delta = 2 * by_hand(b, nblocks) @ a
    assert_close(second.get_delta_weight("default"), delta)
    hidden = features(2 * 3, 6).view(2, 3, 6)
    assert_close(second(hidden), hidden @ (second.weight + delta).T + second.bias)


def test_the_start() -> None:
    net = two_layers(init_lora_weights=False)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
    get_peft_model(plain, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    # the factor that is not block-diagonal is what LoRA draws
    assert_equal(net[0].lora_B["default"].weight, plain[0].lora_B["default"].weight)
    drawn = net[0].lora_A["default"].weight
    assert 0.5 * math.sqrt(6 / 4) < drawn.abs().max() <= math.sqrt(6 / 4)
    assert not net[1].lora_B["default"].weight.any() and net[1].lora_A["default"].weight.any()
    fresh, x = two_layers(), features(3, 8)
    torch.manual_seed(0)
    assert_equal(fresh(x), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))(x))


def test_starting_anew_keeps_the_parameters() -> None:
    layer = two_layers()[0]
    parameter, before = layer.lora_A["default"].weight, layer.lora_A["default"].weight.clone()
    layer.reset_lora_parameters("default", "gaussian")
    assert layer.lora_A["default"].weight is parameter and not torch.equal(parameter, before)


def test_a_target_in_neither_list() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10))
    with refused(net, ValueError, "'1': neither target_modules_bd_a nor", "match_strict=False"):
        get_peft_model(net, config(b=()))
    get_peft_model(net, config(b=(), match_strict=False))
    assert type(net[0].lora_A["default"]) is BlockDiagonalLinear
    assert net[1].variants == {} and net[1].lora_A["default"].weight.shape == (4, 6)


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"a": ("0", "ers"), "b": ("layers",), "target_modules": ["up"]}, "are both in its name"),
        ({"nblocks": 3, "target_modules": ["up"], "a": ("up",)}, "nblocks=3 does not divide r=4 and in_features=8"),
        ({"nblocks": 4, "target_modules": ["head"], "b": ("head",), "r": 2}, "nblocks=4 does not divide r=2;"),
        ({"init_lora_weights": "orthogonal", "target_modules": ["up"], "a": ("up",)}, "use True, False or 'gaussian'"),
        ({"init_lora_weights": "pissa", "target_modules": ["up"], "a": ("up",)}, "use True, False or 'gaussian'"),
    ],
)
def test_targets_that_are_refused(changes: dict[str, Any], mention: str) -> None:
    net = stack()
    with refused(net, ValueError, mention):
        get_peft_model(net, config(**changes))


def test_configs_that_are_refused() -> None:
    with pytest.raises(ValueError, match="up stands in target_modules_bd_a and in target_modules_bd_b"):
        BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["up"])
    with pytest.raises(ValueError, match="nblocks must be positive, found 0"):
        BdLoraConfig(nblocks=0)
    with pytest.raises(TypeError, match="use_bdlora must be a BdLoraConfig"):
        LoraConfig(use_bdlora=True)


def test_a_layer_made_by_hand_needs_the_name_of_its_target() -> None:
    with pytest.raises(ValueError, match="give target_name to the layer"):
        Linear(nn.Linear(8, 6), "default", config=config(), r=4)
    layer = Linear(nn.Linear(8, 6), "default", config=config(), r=4, target_name="model.0")
    assert layer.lora_A["default"].weight.shape == (4, 4)


def test_weights_stored_as_in_out() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Conv1D(6, 8)), features(3, 8)
    model = get_peft_model(net, config(target_modules=["0"], fan_in_fan_out=True))
    randomise(model)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected)


def test_the_linear_layer_of_blocks() -> None:
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(6, 4, 2, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    whole = layer.weight_as_blockdiagonal_matrix()
    assert_close(whole, by_hand(layer.weight, 2).double())
    assert_close(layer(x), x @ whole.T)
    assert not BlockDiagonalLinear(6, 4, 2, init_zero=True).weight.any()
    with pytest.raises(ValueError, match="nblocks=4 does not divide in_features=6;"):
        BlockDiagonalLinear(6, 4, 4)
