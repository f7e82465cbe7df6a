# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that stand in a module in the place of its own."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from peft.layers.standing_in import standing_in


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


def parametrised() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))


def with_attribute() -> nn.Module:
    """As FSDP has it while it computes."""
    net = plain()
    weight = net[0]._parameters["weight"].detach()
    del net[0]._parameters["weight"]
    net[0].weight = weight
    return net


@pytest.mark.parametrize("make", [plain, parametrised, with_attribute])
def test_a_tensor_is_read_inside_of_the_context_alone(make):
    net, x = make(), torch.ones(1, 3)
    before = net(x)
    with standing_in(net, {"0.weight": torch.zeros(2, 3)}):
        assert torch.equal(net(x), net[0].bias.unsqueeze(0))
    assert torch.equal(net(x), before)
    with pytest.raises(KeyboardInterrupt), standing_in(net, {"0.weight": torch.zeros(2, 3)}):
        raise KeyboardInterrupt
    assert torch.equal(net(x), before)


def test_another_name_of_a_parameter_is_another_place():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    with standing_in(net, {"0.weight": torch.zeros(2, 2)}):
        assert not net[0].weight.any() and net[1].weight.any()
