# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where the parts of models are, and caches that are moved to them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from peft.utils.error import PeftRuntimeError, PeftValueError
from peft.utils.integrations import get_layer_device_map, map_cache_to_layer_device_map


def divided(**places) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(num_hidden_layers=2)
    model.hf_device_map = {name.replace("__", "."): device for name, device in places.items()}
    return model


@pytest.mark.parametrize(
    "places, expected",
    [
        ({"": 0}, {0: 0, 1: 0}),
        ({"model__layers__0": 0, "model__layers__1": 1, "head": "cpu"}, {0: 0, 1: 1}),
        ({"model__layers__0": 0, "model__layers__1": "disk"}, {0: 0, 1: 0}),
        ({"model__layers__0": "cpu", "model__layers__1": "disk"}, {0: "cpu", 1: "cpu"}),
    ],
)
def test_devices_of_layers(places, expected):
    assert get_layer_device_map(divided(**places)) == expected


def test_a_layer_without_a_device_is_refused():
    with pytest.raises(PeftRuntimeError, match="layer 1 on no device; it names model.layers.0"):
        get_layer_device_map(divided(model__layers__0=0))


def test_a_model_that_is_in_one_piece_is_refused():
    with pytest.raises(PeftValueError, match="no hf_device_map"):
        get_layer_device_map(nn.Linear(2, 2))


def test_a_cache_follows_the_layers():
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), index)
    map_cache_to_layer_device_map(nn.Linear(2, 2), cache)  # nothing to do
    assert cache.layers[1].keys.device.type == "cpu"
    map_cache_to_layer_device_map(divided(layers__0="meta", layers__1="cpu"), cache)
    # an offloaded layer computes where the others do
    assert {layer.keys.device.type for layer in cache.layers} == {"meta"}
    assert {layer.values.device.type for layer in cache.layers} == {"meta"}
