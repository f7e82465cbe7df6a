# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PEANuT against its network written down, its starts, and merging in stages."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from peft import PeanutConfig, get_peft_model
from peft.tuners.peanut.layer import PeanutLayer


def adapted(net: nn.Sequential, **fields: object) -> PeanutLayer:
    get_peft_model(net, PeanutConfig(**{"target_modules": ["0"], "r": 3, "init_weights": False, **fields}))
    return net[0]


def update(layer: PeanutLayer, w: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    """Bring each column of the weight through the network by itself."""
    act = ACT2FN[layer.act_fn[adapter]]
    encoders, decoders = layer.peanut_encoders[adapter], layer.peanut_decoders[adapter]
    columns = []
    for column in w.T:
        codes = [act(layer.peanut_A[adapter].weight @ column)]
        for encoder in encoders:
            codes.append(act(encoder.weight @ codes[-1]))
        result = codes[-1]
        for i, decoder in enumerate(decoders, start=1):
            result = act(decoder.weight @ result) + codes[len(encoders) - i]
        columns.append(layer.scaling[adapter] * (layer.peanut_B[adapter].weight @ result))
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize("fields", [{}, {"depth": 1}, {"depth": 2, "act_fn": "gelu"}, {"scaling": 0.5}])
def test_a_network_turns_the_weight_into_the_update(fields: dict) -> None:
    layer, x = adapted(nn.Sequential(nn.Linear(6, 4)), **fields), torch.randn(3, 6)
    base = layer.base_layer
    w = base.weight.detach().clone()
    expected = x @ (w + update(layer, w)).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, update(layer, w))
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.get_delta_weight("default"), delta)
    layer.unmerge()
    assert torch.equal(base.weight, w)


def test_adapters_see_the_same_weight_also_when_merged_one_after_the_other() -> None:
    layer = adapted(nn.Sequential(nn.Linear(6, 4)))
    layer.update_layer("other", PeanutConfig(r=2, depth=1, init_weights=False))
    w = layer.base_layer.weight.detach().clone()
    expected = w + update(layer, w) + update(layer, w, "other")
    layer.set_adapter(["default", "other"])
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    torch.testing.assert_close(layer.base_layer.weight, expected)


def test_gradients_do_not_reach_the_weight() -> None:
    layer = adapted(nn.Sequential(nn.Linear(6, 4)), depth=1)
    layer.base_layer.requires_grad_(True)
    (layer(torch.zeros(3, 6)) ** 2).sum().backward()
    assert not layer.base_layer.weight.grad.any()
    layer(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in layer.adapter_parameters("default"))


@pytest.mark.parametrize("start", [True, False])
def test_starts(start: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    torch.manual_seed(0)
    layer = adapted(net, depth=1, init_weights=start)
    torch.manual_seed(0)
    sizes = (3, 4), (3, 3), (3, 3), (4, 3)
    for _ in range(2):
        drawn = [nn.init.kaiming_uniform_(torch.empty(size), a=5**0.5) for size in sizes[: 4 - start]]
        if start and _ == 0:
            nn.init.kaiming_uniform_(torch.empty(sizes[3]), a=5**0.5)
    drawn += [torch.zeros(4, 3)] * start
    modules = layer.peanut_A["default"], layer.peanut_encoders["default"][0], layer.peanut_decoders["default"][0]
    for module, expected in zip((*modules, layer.peanut_B["default"]), drawn, strict=True):
        assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("fields", [{"r": 0}, {"depth": -1}, {"act_fn": "other"}])
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        PeanutConfig(**fields)
