# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""SHiRA against weights whose entries are changed one by one."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel, ShiraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.shira.mask_functions import random_mask


def adapted(base: nn.Module, **fields: object) -> ShiraLayer:
    net = nn.Sequential(base)
    get_peft_model(net, ShiraConfig(target_modules=["0"], **{"r": 2, "init_weights": False, **fields}))
    return net[0]


def changed_weight(layer: ShiraLayer, adapter: str = "default", scale: float = 1.0) -> torch.Tensor:
    weight = layer.base_layer.weight.detach().clone()
    places = layer.shira_indices[adapter].T.tolist()
    for value, (row, column) in zip(layer.shira_weight[adapter].detach(), places, strict=True):
        weight[row, column] += scale * value
    return weight


@pytest.mark.parametrize("seed", [None, 5])
def test_places_are_those_of_the_seed(seed: int | None) -> None:
    layer = adapted(nn.Linear(6, 8), random_seed=seed)
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    chosen = torch.randperm(48, generator=generator)[:28].sort().values
    assert torch.equal(layer.shira_indices["default"], torch.stack((chosen // 6, chosen % 6)).int())
    assert layer.shira_indices["default"].dtype == torch.int32
    assert sorted(layer.state_dict())[-2:] == ["shira_indices.default", "shira_weight.default"]


@pytest.mark.parametrize("listen", [False, True])
def test_entries_change(listen: bool) -> None:
    layer, x = adapted(nn.Linear(6, 8)), torch.randn(3, 6)
    heard = []
    if listen:  # then the base layer itself has to be called
        layer.base_layer.register_forward_hook(lambda *args: heard.append(args))
    expected = x @ changed_weight(layer).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert len(heard) == listen
    layer.set_scale("default", 3.0)
    layer.set_scale("other", 3.0)
    torch.testing.assert_close(layer(x), x @ changed_weight(layer, scale=3.0).T + layer.base_layer.bias)
    layer.merge()
    torch.testing.assert_close(
        layer.base_layer.weight, layer.get_delta_weight("default") + layer.weight_before_merge()
    )


def test_several_adapters_add_up() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    model = get_peft_model(net, ShiraConfig(target_modules=["0"], r=2, init_weights=False))
    model.add_adapter("other", ShiraConfig(target_modules=["0"], r=3, init_weights=False, random_seed=2))
    model.base_model.set_adapter(["default", "other"])
    layer = net[0]
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ deltas.T)


def test_half_precision_merges_exactly() -> None:
    layer, x = adapted(nn.Linear(6, 8).bfloat16()), torch.randn(3, 6).bfloat16()
    assert layer.shira_weight["default"].dtype == torch.float32
    expected = layer(x)
    layer.merge()
    assert torch.equal(layer(x), expected)


def test_gradients_are_those_of_the_delta() -> None:
    layer, x = adapted(nn.Linear(6, 8)), torch.randn(3, 6)
    weight = layer.shira_weight["default"]
    found = torch.autograd.grad(layer(x).square().sum(), weight)[0]
    dense = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(found, torch.autograd.grad(dense.square().sum(), weight)[0])


def test_start() -> None:
    base = nn.Linear(6, 8)
    torch.manual_seed(1)
    layer = adapted(base)
    torch.manual_seed(1)
    assert torch.equal(layer.shira_weight["default"], torch.randn(28))
    layer.reset_shira_parameters("default")
    assert not layer.shira_weight["default"].any()
    assert not layer.supports_lora_conversion()


def first_rows(base_layer: nn.Linear, r: int, **kwargs: object) -> torch.Tensor:
    mask = torch.zeros_like(base_layer.weight)
    mask.view(-1)[: r * (base_layer.in_features + base_layer.out_features)] = 1
    return mask


def test_masks_of_ones_own(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="mask_type='first'"):
        config = ShiraConfig(r=2, target_modules=["0"], mask_type="first", init_weights=False)
    net = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"set config\.mask_fn"):
        get_peft_model(net, config)
    assert type(net[0]) is nn.Linear
    config.mask_fn = lambda *args, **kwargs: first_rows(args[0], 1)
    with pytest.raises(ValueError, match="28 ones, found 14"):
        get_peft_model(net, config)
    assert type(net[0]) is nn.Linear
    config.mask_fn = first_rows
    model = get_peft_model(net, config)
    assert net[0].shira_indices["default"].tolist() == [[i // 6 for i in range(28)], [i % 6 for i in range(28)]]
    x = torch.randn(3, 6)
    expected = model(x)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(nn.Sequential(net[0].base_layer), tmp_path)
    torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_loaded_places_replace_those_of_the_seed(dtype: torch.dtype, tmp_path: Path) -> None:
    base = nn.Linear(6, 8)
    model = get_peft_model(nn.Sequential(base), ShiraConfig(r=2, target_modules=["0"], init_weights=False))
    model.save_pretrained(tmp_path)
    other = get_peft_model(nn.Sequential(base), ShiraConfig(r=2, target_modules=["0"], random_seed=3))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.0.shira_indices"
    set_peft_model_state_dict(other, {**tensors, key: tensors[key].to(dtype)})
    x, found = torch.randn(3, 6), other.base_model.model[0].shira_indices["default"]
    assert found.dtype == torch.int32
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("r", [0, 4])
def test_number_that_does_not_fit_is_refused(r: int) -> None:
    net = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match="at most the 48 entries"):
        get_peft_model(net, ShiraConfig(target_modules=["0"], r=r))
    assert type(net[0]) is nn.Linear


def test_random_mask() -> None:
    mask = random_mask(nn.Linear(6, 8), 2, random_seed=4, more=1)
    assert mask.dtype == torch.bool
    assert mask.shape == (8, 6)
    assert mask.sum() == 28
