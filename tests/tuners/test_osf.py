# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OSF against its formula, gradients that stay out of the leading directions, ranks, and merging."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import OSFConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.osf.utils import decompose_weight_matrix, project_gradient_to_orthogonal_space


SIZES = [(6, 4), (4, 6), (5, 5)]


def adapted(base: nn.Module, **fields: object) -> OSFLayer:
    net = nn.Sequential(base)
    get_peft_model(net, OSFConfig(**{"target_modules": ["0"], "effective_rank": 2, "init_weights": False, **fields}))
    return net[0]


def parts(layer: OSFLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(layer.osf_svd_params["default"][f"{name}_low"] for name in "USV")


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_all_but_the_leading_directions_are_replaced(kind: type, inputs: int, outputs: int) -> None:
    base = nn.Linear(inputs, outputs) if kind is nn.Linear else Conv1D(outputs, inputs)
    layer, x = adapted(base), torch.randn(3, inputs)
    stored = base.weight.detach().clone()
    w = stored if kind is nn.Linear else stored.T
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    own_u, own_s, own_v = parts(layer)
    changed = (u[:, :2] * s[:2]) @ v[:2] + own_u @ torch.diag(own_s) @ own_v
    expected = x @ changed.T + base.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    merged = base.weight.detach().clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(base.weight, merged)
    layer.unmerge()
    torch.testing.assert_close(base.weight, stored, atol=1e-5, rtol=1e-5)


def as_it_is(layer: OSFLayer) -> OSFLayer:
    return layer


def half(layer: OSFLayer) -> OSFLayer:
    return layer.to(torch.bfloat16)


def other_parameters(layer: OSFLayer) -> OSFLayer:
    container = layer.osf_svd_params["default"]
    for name in list(container.keys()):
        container[name] = nn.Parameter(container[name].detach().clone())
    return layer


def through_pickle(layer: OSFLayer) -> OSFLayer:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("change", [as_it_is, copy.deepcopy, through_pickle, half, other_parameters])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_gradients_stay_out_of_the_leading_directions(inputs: int, outputs: int, change: Callable) -> None:
    layer = change(adapted(nn.Linear(inputs, outputs)))
    w = layer.base_layer.weight.detach().float()
    u, _, v = (tensor[..., :2] if i == 0 else tensor[:2] for i, tensor in enumerate(torch.linalg.svd(w, False)))
    layer(torch.randn(3, inputs, dtype=layer.base_layer.weight.dtype)).float().pow(2).sum().backward()
    own_u, own_s, own_v = parts(layer)
    assert own_s.grad.any()
    for leading, gradient in ((u, own_u.grad), (v.T, own_v.grad.T)):
        inside = (leading.T @ gradient.float()).norm() / gradient.float().norm()
        assert inside < (1e-5 if gradient.dtype == torch.float32 else 0.05)
        assert gradient.any()


def test_gradients_are_those_of_the_functions_of_the_released_package() -> None:
    for inputs, outputs in SIZES:
        layer, x = adapted(nn.Linear(inputs, outputs), init_weights=True), torch.randn(3, inputs)
        layer(x).pow(2).sum().backward()
        taken = decompose_weight_matrix(layer.base_layer.weight, 2)
        high = (taken["U_high"] * taken["S_high"]) @ taken["V_high"]
        weight = high + (taken["U_low"] * taken["S_low"]) @ taken["V_low"]
        (x @ weight.T + layer.base_layer.bias).pow(2).sum().backward()
        project_gradient_to_orthogonal_space(taken)
        for own, name in zip(parts(layer), ("U_low", "S_low", "V_low"), strict=True):
            torch.testing.assert_close(own.grad.norm(), taken[name].grad.norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"effective_rank": None}, 2),
        ({"effective_rank": 0.5}, 2),
        ({"effective_rank": 1.0}, 4),
        ({"effective_rank": 1}, 1),
        ({"effective_rank": 99}, 4),
        ({"rank_pattern": {"other": 1, "laye": 3, "layer": 1}}, 3),
        ({"rank_pattern": {"^ayer": 1, "r$": 0.25}}, 1),
    ],
)
def test_how_many_directions_stay(fields: dict, expected: int) -> None:
    net = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    get_peft_model(net, OSFConfig(target_modules=["layer"], **fields))
    assert net["layer"].effective_rank["default"] == expected
    assert parts(net["layer"])[1].shape == (4 - expected,)


def test_starts() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    before = net(x)
    model = get_peft_model(net, OSFConfig(target_modules=["0"]))
    torch.testing.assert_close(model(x), before)
    base = nn.Linear(6, 4)
    torch.manual_seed(0)
    layer = adapted(base)
    torch.manual_seed(0)
    for own, size in zip(parts(layer), ((4, 2), (2,), (2, 6)), strict=True):
        assert torch.equal(own, torch.randn(size))


def test_all_active_adapters_count() -> None:
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    layer.update_layer("other", OSFConfig(effective_rank=1, init_weights=False))
    change = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T)


def test_all_linear_layers_of_a_model_without_defaults() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    get_peft_model(net, OSFConfig())
    assert all(isinstance(layer, OSFLayer) for layer in net)


def test_no_direction_that_stays_is_refused() -> None:
    base = nn.Linear(6, 4)
    net = nn.Sequential(base)
    with pytest.raises(ValueError, match="effective_rank=0"):
        get_peft_model(net, OSFConfig(target_modules=["0"], effective_rank=0))
    assert net[0] is base
