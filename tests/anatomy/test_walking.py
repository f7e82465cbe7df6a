# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What stands around a layer of the base model, and the layer itself, are found whatever was put around it."""

import pytest
from torch import nn

from peft import IA3Config, LoraConfig, OFTConfig, PeftMixedModel, get_peft_model
from peft.anatomy.walking import innermost_base_layer, is_adapter_layer, is_adapter_module, stack_of, unwrapped


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 4))


def test_a_bare_layer_is_itself(net: nn.Sequential) -> None:
    assert unwrapped(net[1]) is net[1]
    assert stack_of(net[1]) == []
    assert not is_adapter_layer(net[1])


def test_layers_of_several_methods_around_one(net: nn.Sequential) -> None:
    base = net[1]
    model = PeftMixedModel(net, LoraConfig(target_modules=["1"]), "lora")
    model.add_adapter("oft", OFTConfig(target_modules=["1"], oft_block_size=4))
    stack = stack_of(net[1])
    assert len(stack) == 2 and stack[0] is net[1] and stack[0].base_layer is stack[1] and stack[1].base_layer is base
    assert unwrapped(net[1]) is base
    assert all(innermost_base_layer(layer) is base and layer.get_base_layer() is base for layer in stack)


def test_a_layer_of_the_base_model_that_has_a_base_layer_of_its_own() -> None:
    """Only what this package has put into the model is taken off."""
    foreign = nn.Module()
    foreign.base_layer = nn.Linear(2, 2)
    assert unwrapped(foreign) is foreign
    assert stack_of(foreign) == []


def test_wrappers_are_no_layers(net: nn.Sequential) -> None:
    get_peft_model(net, IA3Config(target_modules=["1"], feedforward_modules=[], modules_to_save=["2"]))
    assert is_adapter_layer(net[1]) and is_adapter_module(net[2])
    assert not is_adapter_layer(net[2])
    assert unwrapped(net[2]) is net[2]
