# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Uni-LoRA against factors that are put together entry by entry, and what checkpoints say of them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import assert_close, assert_equal, linears, refused, trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, UniLoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.unilora import UniLoraModel
from peft.tuners.unilora.maths import positions
from peft.utils.error import PeftValueError


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:peft.utils.warning.PeftWarning"),
]


def adapted(base: nn.Module, *targets: str, **fields: object) -> PeftModel:
    config = {"r": 2, "theta_d_length": 7, "init_weights": False, "target_modules": list(targets), **fields}
    return get_peft_model(base, UniLoraConfig(**config)).eval()


def index(count: int, length: int, seed: int) -> list[int]:
    """Each entry of the vector as often as the others, shuffled."""
    generator = np.random.default_rng(seed)
    entries = [entry for entry in range(length) for _ in range(count // length)]
    entries += generator.choice(length, size=count % length, replace=False).tolist() if count % length else []
    entries = np.array(entries)
    generator.shuffle(entries)
    return entries.tolist()


def test_factors_entry_by_entry() -> None:
    """Places are counted through all layers, first those of A, row by row."""
    net = nn.Sequential(nn.Linear(5, 4), Conv1D(3, 4))
    weights = [net[0].weight.detach().clone(), net[1].weight.detach().T.clone()]
    model = adapted(net, "0", "1", proj_seed=3)
    theta = model.base_model.unilora_theta_d["default"].detach()
    entries = index(2 * (5 + 4 + 4 + 3), 7, 3)
    values = iter([theta[entry] / entries.count(entry) ** 0.5 for entry in entries])
    for layer, weight in zip(net, weights, strict=True):
        out, inputs = weight.shape
        a = torch.tensor([[next(values) for _ in range(inputs)] for _ in range(2)])
        b = torch.tensor([[next(values) for _ in range(2)] for _ in range(out)])
        x = torch.randn(3, inputs)
        assert_close(layer(x), x @ (weight + b @ a).T + layer.bias)
        layer.merge()
        assert_close(layer(x), x @ (weight + b @ a).T + layer.bias)
        layer.unmerge()


@pytest.mark.parametrize(("count", "length"), [(12, 4), (13, 4), (3, 5), (0, 2)])
def test_positions(count: int, length: int) -> None:
    """What goes nowhere has a scale of 0; the map from vectors to places keeps lengths."""
    entries, scales = positions(count, length, 1)
    assert entries.tolist() == index(count, length, 1)
    used = torch.zeros(length).scatter(0, entries, 1.0)
    vector = torch.randn(length) * used
    assert_close((vector * scales)[entries].norm(), vector.norm())
    assert not scales[used == 0].any()
    again = UniLoraModel.generate_index(count, length, 1)
    assert again.dtype == torch.int64 and torch.equal(again, entries)


def test_positions_that_cannot_be() -> None:
    for arguments in ((-1, 2, 0), (3, 0, 0)):
        with pytest.raises(ValueError, match="positive length"):
            UniLoraModel.generate_index(*arguments)


def test_one_vector() -> None:
    """It is what is trained and what is saved, and all layers have a part in its gradient."""
    net = linears(4, 6, 2)
    model = adapted(net, "0", "1")
    assert trainable(model) == {"base_model.model.0.unilora_theta_d.default"}
    assert set(get_peft_model_state_dict(model)) == {"base_model.unilora_theta_d"}
    model(torch.randn(3, 4)).sum().backward()
    theta = model.base_model.unilora_theta_d["default"]
    assert theta.grad.all() and net[0].unilora_theta_d is net[1].unilora_theta_d


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start(init_weights: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    net = linears(4, 6).to(dtype)
    torch.manual_seed(2)
    model = adapted(net, "0", init_weights=init_weights, init_theta_d_bound=0.3)
    torch.manual_seed(2)
    drawn = torch.empty(7).uniform_(-0.3, 0.3) if init_weights else torch.randn(7)
    assert_equal(model.base_model.unilora_theta_d["default"], drawn.to(dtype).float())


@pytest.mark.parametrize("save_indices", [True, False])
def test_second_adapter_is_what_it_is_alone(tmp_path: Path, save_indices: bool) -> None:
    """Each adapter counts the places of its own targets, and says itself whether they are saved."""
    torch.manual_seed(0)
    base = linears(4, 4, 4)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "0", "1", save_indices=not save_indices)
    config = UniLoraConfig(r=3, theta_d_length=5, target_modules=["1"], save_indices=save_indices, init_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    for name, saved in (("default", not save_indices), ("second", save_indices)):
        assert any("indices" in key and name in key for key in model.state_dict()) is saved
    fresh = linears(4, 4, 4)
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path / "second")
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))
    assert any("indices" in key for key in get_peft_model_state_dict(again)) is save_indices


def test_indices_of_the_file_are_used(tmp_path: Path) -> None:
    base = linears(4, 4)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "0", save_indices=True)
    base[0].unilora_indices_A["default"].zero_()
    model.save_pretrained(tmp_path)
    fresh = linears(4, 4)
    fresh.load_state_dict(state)
    x = torch.randn(3, 4)
    assert_equal(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"theta_d_length": 0},
        {"init_theta_d_bound": 0.0},
        {"bias": "some"},
        {"unilora_dropout": 1.5},
        {"target_modules": "x", "layers_pattern": "layers"},
    ],
)
def test_refused_by_the_config(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(fields))):
        UniLoraConfig(**fields)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("save_indices", [False, True])
def test_setting_entries_and_scales(merged: bool, save_indices: bool) -> None:
    model = adapted(linears(4, 6), "0", save_indices=save_indices)
    layer, x = model.base_model.model[0], torch.randn(3, 4)
    before = layer.base_layer(x)
    if merged:
        layer.merge()
    torch.manual_seed(0)
    layer.reset_unilora_parameters("default", 5)
    torch.manual_seed(0)
    drawn = torch.randint(5, (2, 4)), torch.randint(5, (6, 2))
    scales = torch.rand(2, 4), torch.rand(6, 2)
    layer.update_scaling("default", *scales)
    layer.reset_unilora_parameters("unknown", 5)
    layer.update_scaling("unknown", *scales)
    assert_equal(layer.unilora_indices_A["default"], drawn[0])
    assert_equal(layer.unilora_indices_B["default"], drawn[1])
    theta = layer.unilora_theta_d["default"]
    a, b = (theta[index] * scale for index, scale in zip(drawn, scales, strict=True))
    assert_close(layer(x), before + x @ a.T @ b.T)
    assert_close(copy.deepcopy(model)(x), layer(x))
    if merged:
        layer.unmerge()
        assert_close(layer.base_layer(x), before)


def test_entries_and_scales_that_do_not_fit() -> None:
    model = adapted(linears(4, 6), "0")
    layer = model.base_model.model[0]
    for length in (0, 8):
        with refused(model, PeftValueError, "theta_d_length must be positive and at most 7"):
            layer.reset_unilora_parameters("default", length)
    with refused(model, PeftValueError, "scales_B must have shape"):
        layer.update_scaling("default", torch.ones(2, 4), torch.ones(2, 6))
