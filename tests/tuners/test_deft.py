# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DEFT against its formula, dropout, its starts, and merging in stages."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import DeftConfig, get_peft_model
from peft.tuners.deft.layer import DeftLayer
from peft.utils.warning import PeftWarning


def adapted(base: nn.Module, **fields: object) -> DeftLayer:
    net = nn.Sequential(base)
    get_peft_model(net, DeftConfig(**{"target_modules": ["0"], "r": 2, "init_weights": False, **fields}))
    with torch.no_grad():
        for parameter in net[0].adapter_parameters("default"):
            parameter.normal_()
    return net[0]


def update(layer: DeftLayer, w: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    p = layer.deft_P[adapter].detach()
    q, k = (p, p.clamp(min=0)) if layer.deft_decomposition[adapter] == "relu" else (torch.linalg.qr(p).Q,) * 2
    put = 0 if layer.deft_para[adapter] else layer.deft_scaling[adapter] * q @ layer.deft_R[adapter].detach()
    return put - q @ k.T @ w


@pytest.mark.parametrize("base", [nn.Linear(6, 6), nn.Linear(6, 4, bias=False), Conv1D(6, 6)])
@pytest.mark.parametrize("fields", [{}, {"decomposition_method": "qr", "alpha": 6}, {"para": True}])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_what_lies_in_directions_is_replaced(base: nn.Module, fields: dict) -> None:
    layer, x = adapted(base, **fields), torch.randn(3, 6)
    stored = base.weight.detach().clone()
    w = stored.T if isinstance(base, Conv1D) else stored
    expected = x @ (w + update(layer, w)).T + (0 if base.bias is None else base.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, stored)


@pytest.mark.parametrize("merged", [(), ("default",), ("default", "other")])
def test_adapters_see_the_same_weight(merged: tuple) -> None:
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    layer.update_layer("other", DeftConfig(r=3, decomposition_method="qr", init_weights=False))
    w, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    layer.set_adapter(["default", "other"])
    for name in merged:
        layer.merge(adapter_names=[name])
    expected = w + update(layer, w) + update(layer, w, "other")
    torch.testing.assert_close(layer(x), x @ expected.T + bias, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_made_while_another_is_merged_changes_nothing() -> None:
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    layer.merge()
    layer.update_layer("other", DeftConfig(r=2))
    layer.unmerge()
    layer.set_adapter("other")
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_dropout_spares_what_is_removed() -> None:
    layer, x = adapted(nn.Linear(6, 4), deft_dropout=1 - 1e-9), torch.randn(3, 6)
    w, p = layer.base_layer.weight.detach(), layer.deft_P["default"].detach()
    removed = w - p @ p.clamp(min=0).T @ w
    layer.train()
    torch.testing.assert_close(layer(x), x @ removed.T + layer.base_layer.bias)


@pytest.mark.parametrize("fields", [{}, {"init_weights": False, "init_scale": 3.0}, {"para": True}])
def test_starts(fields: dict) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    torch.manual_seed(0)
    get_peft_model(net, DeftConfig(target_modules=["0"], r=8, alpha=2, **fields))
    torch.manual_seed(0)
    layer, w = net[0], net[0].base_layer.weight
    p = torch.empty(4, 4).normal_(std=0.02)
    assert torch.equal(layer.deft_P["default"], p)
    if fields.get("para"):
        assert "default" not in layer.deft_R
    elif fields:
        assert torch.equal(layer.deft_R["default"], torch.empty(4, 6).normal_(std=0.06))
    else:
        torch.testing.assert_close(layer.deft_R["default"] * layer.deft_scaling["default"], p.clamp(min=0).T @ w)


def test_there_is_no_scale() -> None:
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    before = layer(x)
    for change in (lambda: layer.scale_layer(0.5), layer.unscale_layer):
        with pytest.warns(PeftWarning, match="no scale"):
            change()
    layer.scale_layer(1)
    assert torch.equal(layer(x), before)


def test_refused() -> None:
    with pytest.raises(ValueError, match="decomposition_method"):
        DeftConfig(decomposition_method="other")
    base = nn.Linear(6, 4)
    net = nn.Sequential(base)
    with pytest.raises(ValueError, match="r must be positive"):
        get_peft_model(net, DeftConfig(target_modules=["0"], r=0))
    assert net[0] is base
