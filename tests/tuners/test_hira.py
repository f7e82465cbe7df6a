# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HiRA against its formula, entry by entry, and its starts."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import HiraConfig, get_peft_model
from peft.tuners.hira.layer import HiraLayer
from peft.utils.warning import PeftWarning


def adapted(base: nn.Module, **fields: object) -> HiraLayer:
    net = nn.Sequential(base)
    get_peft_model(net, HiraConfig(**{"target_modules": ["0"], "r": 2, "init_weights": False, **fields}))
    return net[0]


@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(6, 4),
        Conv1D(4, 6),
        nn.Embedding(7, 4),
        nn.Conv1d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (1, 3), padding_mode="reflect", padding=(0, 1)),
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Conv3d(3, 4, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_update_is_the_weight_times_the_factors(base: nn.Module) -> None:
    layer = adapted(base)
    a, b = (
        layer._modules[name]["default"]
        for name in layer._modules
        if name.endswith(("_A", "_B")) and layer._modules[name]
    )
    matrix = torch.einsum("ok,ki->oi", b.flatten(1), a.flatten(1))
    weight = base.weight
    matrix = matrix.T if isinstance(base, (Conv1D, nn.Embedding)) else matrix.reshape(weight.shape)
    torch.testing.assert_close(layer.get_delta_weight("default"), weight * matrix)
    if isinstance(base, nn.Embedding):
        x = torch.tensor([[1, 6, 0]])
    elif isinstance(base, (nn.Linear, Conv1D)):
        x = torch.randn(2, 6)
    else:
        x = torch.randn(2, 3, *[5] * len(base.kernel_size))
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_adapters_add_up_and_leave_the_weight_as_it_was() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    weight = net[0].weight.detach().clone()
    config = HiraConfig(target_modules=["0"], r=2, init_weights=False)
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    layer = net[0]
    sums = sum(layer.hira_B[name] @ layer.hira_A[name] for name in ("default", "other"))
    torch.testing.assert_close(model(x), x @ (weight * (1 + sums)).T + layer.base_layer.bias)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)


def test_linear_layers_need_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6, requires_grad=True)
    delta = layer.get_delta_weight("default")
    expected = layer.base_layer(x) + x @ delta.T
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: products.append(1) or linear(*given))
    torch.testing.assert_close(layer(x), expected)
    assert len(products) == 1
    wanted = x, layer.hira_A["default"], layer.hira_B["default"]
    gradients = [torch.autograd.grad(y.sum(), wanted, retain_graph=True) for y in (layer(x), expected)]
    torch.testing.assert_close(*gradients)


def test_nothing_that_is_beside_the_weight_is_left_out() -> None:
    layer, x = adapted(nn.Linear(6, 4), hira_dropout=1.0), torch.randn(3, 6)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    heard = []
    layer.base_layer.register_forward_hook(lambda *given: heard.append(1))
    layer.eval()(x)
    assert heard
    halves = adapted(nn.Linear(6, 4, dtype=torch.bfloat16))
    with torch.no_grad():
        halves.hira_A["default"].fill_(1e-2)
        halves.hira_B["default"].fill_(1e-2)  # W + W * 2e-4 is W in so few digits
        half = torch.ones(1, 6, dtype=torch.bfloat16)
        assert halves.delta_forward("default", half).any()


@pytest.mark.parametrize(("start", "expected"), [(True, 6**-0.5), ("gaussian", None), (False, None)])
def test_starts_of_linear_layers(start: bool | str, expected: float | None) -> None:
    base = nn.Linear(6, 4)
    torch.manual_seed(0)
    layer = adapted(base, init_weights=start)
    torch.manual_seed(0)
    first, second = torch.randn(2, 6), torch.randn(4, 2)
    a, b = layer.hira_A["default"], layer.hira_B["default"]
    if start is False:
        assert torch.equal(a, first) and torch.equal(b, second)
    else:
        other = torch.empty(2, 6)
        other = other.uniform_(-expected, expected) if expected else other.normal_(std=0.5)
        assert torch.equal(a, other) and not b.any()


def test_start_of_embeddings() -> None:
    base = nn.Embedding(7, 4)
    torch.manual_seed(0)
    layer = adapted(base, init_weights=True)
    torch.manual_seed(0)
    torch.randn(2, 7), torch.randn(4, 2)
    assert torch.equal(layer.hira_embedding_B["default"], torch.randn(4, 2))
    assert not layer.hira_embedding_A["default"].any()
    layer.reset_hira_parameters("default", False)
    assert layer.hira_embedding_A["default"].all()


def test_what_has_no_effect_is_said() -> None:
    with pytest.warns(PeftWarning, match="rank_pattern has no effect"):
        layer = adapted(nn.Linear(6, 4), rank_pattern={"0": 1})
    assert layer.hira_A["default"].shape == (2, 6)


@pytest.mark.parametrize("fields", [{"r": 0}, {"init_weights": "other"}])
def test_refused(fields: dict) -> None:
    base = nn.Linear(6, 4)
    net = nn.Sequential(base)
    with pytest.raises(ValueError, match=next(iter(fields))):
        get_peft_model(net, HiraConfig(target_modules=["0"], **fields))
    assert net[0] is base


def test_a_pattern_of_layers_alone() -> None:
    assert HiraConfig(target_modules=["q_proj"], layers_pattern="h").layers_pattern == "h"
