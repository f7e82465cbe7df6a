# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DeLoRA against its directions, one after the other."""

import pytest
import torch
from torch import nn

from peft import DeloraConfig, PeftModel, get_peft_model
from peft.tuners.delora.layer import DeloraLayer


def adapted(base: nn.Module, **fields: object) -> DeloraLayer:
    net = nn.Sequential(base)
    get_peft_model(net, DeloraConfig(**{"target_modules": ["0"], "r": 3, "init_weights": False, **fields}))
    return net[0]


def test_update_direction_by_direction() -> None:
    layer, x = adapted(nn.Linear(6, 4), delora_lambda=5), torch.randn(2, 6)
    a, b = layer.delora_A["default"], layer.delora_B["default"]
    norms = layer.base_layer.weight.pow(2).sum(dim=0).sqrt()
    directions = (torch.outer(b[:, i] / b[:, i].norm(), a[i] / a[i].norm()) for i in range(3))
    delta = 5 / 3 * sum(directions) * norms
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.T)


def test_short_directions_are_not_made_longer() -> None:
    layer = adapted(nn.Linear(6, 4))
    layer.delora_B["default"].data.mul_(1e-6)
    layer.get_delta_weight("default").sum().backward()
    assert layer.get_delta_weight("default").norm() < 1
    assert layer.delora_B["default"].grad.isfinite().all()


def test_start() -> None:
    base = nn.Linear(6, 4)
    torch.manual_seed(0)
    layer = adapted(base, delora_lambda=5, lambda_pattern={"0": 7})
    torch.manual_seed(0)
    torch.testing.assert_close(layer.delora_A["default"].data, torch.empty(3, 6).uniform_(-(6**-0.5), 6**-0.5))
    torch.testing.assert_close(layer.delora_B["default"].data, torch.empty(4, 3).uniform_(-(3**-0.5), 3**-0.5))
    assert layer.delora_lambda["default"].item() == 7
    layer.reset_delora_parameters("default", delora_lambda=2)
    assert layer.delora_lambda["default"].item() == 2 and not layer.delora_B["default"].any()


def test_the_weight_is_measured_without_what_is_merged() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    norms = net[0].weight.norm(dim=0)
    config = DeloraConfig(target_modules=["0"], r=3, init_weights=False)
    model = get_peft_model(net, config)
    model.merge_adapter()
    assert not torch.allclose(net[0].base_layer.weight.norm(dim=0), norms)
    model.add_adapter("other", config)
    torch.testing.assert_close(net[0].delora_w_norm["other"], norms, atol=1e-5, rtol=1e-5)


def test_norms_are_those_of_the_file(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    model = get_peft_model(net, DeloraConfig(target_modules=["0"], r=3, init_weights=False))
    net[0].delora_w_norm["default"].fill_(2.0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 4)), tmp_path)
    assert (again.base_model.model[0].delora_w_norm["default"] == 2).all()


@pytest.mark.parametrize("fields", [{"r": 0}, {"target_modules": ".*", "layers_to_transform": [0]}])
def test_refused_by_the_config(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DeloraConfig(**fields)


def test_a_rank_of_zero_is_refused_by_the_layer() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="must be a positive integer"):
        get_peft_model(net, DeloraConfig(target_modules=["0"], rank_pattern={"0": 0}))
    assert type(net[0]) is nn.Linear
