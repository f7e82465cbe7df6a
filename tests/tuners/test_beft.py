# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BEFT: the vector beside the layer and in its bias, its start, and layers without a bias."""

import pytest
import torch
from torch import nn

from peft import BeftConfig, get_peft_model
from peft.utils.warning import PeftWarning


def test_vectors_are_added_to_outputs_and_to_the_bias() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    config = BeftConfig(target_modules=["0"], init_weights=False)
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    layer = net[0]
    base = layer.base_layer
    weight, bias, before = base.weight, base.bias, base.bias.detach().clone()
    vector = (layer.beft_bias["default"] + layer.beft_bias["other"]).squeeze(0)
    torch.testing.assert_close(model(x), x @ weight.T + before + vector)
    model.merge_adapter()
    assert base.weight is weight
    torch.testing.assert_close(base.bias, before + vector)
    torch.testing.assert_close(model(x), x @ weight.T + before + vector)
    model.unmerge_adapter()
    assert base.bias is bias and torch.equal(bias, before)


def test_each_sample_has_its_own_vector() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    model = get_peft_model(net, BeftConfig(target_modules=["0"], init_weights=False)).eval()
    difference = model(x, adapter_names=["__base__", "default"]) - net[0].base_layer(x)
    torch.testing.assert_close(difference, torch.stack((torch.zeros(4), net[0].beft_bias["default"][0])))


def test_starts_use_the_same_random_numbers() -> None:
    for start in (True, False):
        net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        torch.manual_seed(0)
        get_peft_model(net, BeftConfig(target_modules=["0", "1"], init_weights=start))
        drawn = torch.rand(1)
        torch.manual_seed(0)
        vectors = torch.randn(1, 4), torch.randn(1, 3)
        assert torch.equal(drawn, torch.rand(1))
        for layer, vector in zip(net, vectors, strict=True):
            assert torch.equal(layer.beft_bias["default"], torch.zeros_like(vector) if start else vector)
    net[0].reset_beft_parameters("default")
    assert not net[0].beft_bias["default"].any()


def test_nothing_is_merged_where_one_layer_has_no_bias() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False)), torch.randn(3, 6)
    with pytest.warns(PeftWarning, match="without a bias"):
        model = get_peft_model(net, BeftConfig(target_modules=["0", "1"], init_weights=False))
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no bias to merge it into"):
            merge()
        assert not net[0].merged
    assert torch.equal(model(x), expected)
    assert net[1].beft_bias["default"].abs().sum() > 0
