# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Super-Tuning against weights whose entries are changed one by one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peft import PeftModel, SupertuningConfig, get_peft_model
from peft.tuners.supertuning.layer import SupertuningLayer


def adapted(base: nn.Module, **fields: object) -> SupertuningLayer:
    net = nn.Sequential(base)
    config = SupertuningConfig(target_modules=["0"], **{"sparsity": 0.8, "init_weights": False, **fields})
    get_peft_model(net, config)
    return net[0]


def expected_output(layer: SupertuningLayer, x: torch.Tensor) -> torch.Tensor:
    weight = layer.base_layer.weight.detach().clone()
    places = layer.supertuning_indices["default"].tolist()
    for value, place in zip(layer.supertuning_values["default"].detach(), places, strict=True):
        weight[place // 6, place % 6] += value
    y = x @ weight.T + layer.base_layer.bias
    if layer.supertuning_rank["default"]:
        a, b = layer.supertuning_lora_A["default"].weight, layer.supertuning_lora_B["default"].weight
        y = y + layer.supertuning_lora_alpha["default"] / layer.supertuning_rank["default"] * (x @ a.T @ b.T)
    return y


@pytest.mark.parametrize("select_top", [True, False])
def test_entries_are_chosen_by_magnitude(select_top: bool) -> None:
    base = nn.Linear(6, 8)
    layer = adapted(base, select_top=select_top)
    order = sorted(range(48), key=lambda i: abs(base.weight[i // 6, i % 6].item()), reverse=select_top)
    assert layer.supertuning_indices["default"].tolist() == order[:9]
    assert layer.supertuning_indices["default"].dtype == torch.int32
    layer.half()
    assert layer.supertuning_indices["default"].dtype == torch.int32


def test_number_of_entries_is_rounded_down() -> None:
    assert adapted(nn.Linear(10, 10), sparsity=0.9).supertuning_values["default"].numel() == 9


@pytest.mark.parametrize("fields", [{}, {"r": 2}, {"r": 2, "lora_alpha": 3.0}])
@pytest.mark.parametrize("listen", [False, True])
def test_output(fields: dict, listen: bool) -> None:
    layer, x = adapted(nn.Linear(6, 8), **fields), torch.randn(3, 6)
    if listen:  # then the base layer itself has to be called
        layer.base_layer.register_forward_hook(lambda *args: None)
    expected = expected_output(layer, x)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("listen", [False, True])
def test_only_lora_drops_inputs(listen: bool) -> None:
    layer, x = adapted(nn.Linear(6, 8), r=2, lora_dropout=0.5), torch.randn(3, 6)
    if listen:
        layer.base_layer.register_forward_hook(lambda *args: None)
    without = expected_output(layer, x)
    lora = 2 * layer.supertuning_lora_B["default"](layer.supertuning_lora_A["default"](x))
    assert layer.supertuning_lora_dropout["default"].p == 0.5
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    change = 2 * layer.supertuning_lora_B["default"](layer.supertuning_lora_A["default"](dropped))
    torch.testing.assert_close(layer.train()(x), without - lora + change)
    torch.testing.assert_close(layer.eval()(x), without)


def test_starts() -> None:
    base = nn.Linear(6, 8)
    torch.manual_seed(1)
    layer = adapted(base, r=2)
    after = torch.rand(1)
    torch.manual_seed(1)
    values = torch.randn(9)
    nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
    a, b = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
    assert torch.equal(layer.supertuning_values["default"], values)
    assert torch.equal(layer.supertuning_lora_A["default"].weight, a.weight)
    assert torch.equal(layer.supertuning_lora_B["default"].weight, b.weight)
    assert torch.equal(torch.rand(1), after)
    layer = adapted(nn.Linear(6, 8), r=2, init_weights=True)
    assert not layer.supertuning_values["default"].any()
    assert not layer.supertuning_lora_B["default"].weight.any()
    assert not layer.supports_lora_conversion()
    half = adapted(nn.Linear(6, 8).bfloat16()).supertuning_values["default"]
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())


def test_places_are_found_again(tmp_path: Path) -> None:
    base, x = nn.Linear(6, 8), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        config = SupertuningConfig(
            target_modules=["0"], sparsity=0.8, init_weights=False, save_precomputed_indices=False
        )
    model = get_peft_model(nn.Sequential(base), config)
    assert not [key for key in model.state_dict() if "indices" in key]
    expected = model(x)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        loaded = PeftModel.from_pretrained(nn.Sequential(base), tmp_path)
    torch.testing.assert_close(loaded(x), expected)


def test_what_is_merged_does_not_decide_which_entries_are_trained() -> None:
    net = nn.Sequential(nn.Linear(6, 8))
    model = get_peft_model(net, SupertuningConfig(target_modules=["0"], sparsity=0.8, init_weights=False))
    expected = net[0].supertuning_indices["default"].clone()
    with torch.no_grad():
        net[0].supertuning_values["default"].copy_(-net[0].base_layer.weight.view(-1)[expected])
    model.merge_adapter()
    model.add_adapter("other", SupertuningConfig(target_modules=["0"], sparsity=0.8))
    assert torch.equal(net[0].supertuning_indices["other"], expected)


def test_adapters_agree_on_what_is_saved() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), SupertuningConfig(target_modules=["0"], sparsity=0.8))
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        other = SupertuningConfig(target_modules=["0"], sparsity=0.8, save_precomputed_indices=False)
    with pytest.raises(ValueError, match="save_precomputed_indices must be the same"):
        model.add_adapter("other", other)


@pytest.mark.parametrize(
    "fields", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"lora_dropout": 1.0}, {"r": 0}, {"r": 2.0}, {"lora_alpha": 3.0}]
)
def test_refused_at_construction(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SupertuningConfig(**fields)


def test_too_sparse_for_a_layer() -> None:
    net = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"sparsity=0\.99 leaves none of 48 entries"):
        get_peft_model(net, SupertuningConfig(target_modules=["0"]))
    assert type(net[0]) is nn.Linear
