# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What LoHa and LoKr share: life of an adapter, dropout, scaling, and deltas that are added to the weight."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.helpers import first_layer
from torch import nn

from peft import LoHaConfig, LoKrConfig, PeftModel, PeftWarning, get_peft_model


CONFIGS = [LoHaConfig, LoKrConfig]
BASES = {
    "linear": (lambda: nn.Linear(32, 48), (2, 5, 32)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 7)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="circular"), (2, 16, 7, 6)),
    "grouped": (lambda: nn.Conv2d(16, 24, (3, 2), groups=4, dilation=2, bias=False), (2, 16, 9, 8)),
}

pytestmark = pytest.mark.parametrize("config_cls", CONFIGS)


def make(config_cls: type, base: nn.Module | None = None, **options: object) -> PeftModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48) if base is None else base)
    options = {"r": 2, "alpha": 3, "init_weights": False, **options}
    return get_peft_model(net, config_cls(target_modules=["0"], **options)).eval()


@pytest.fixture(params=BASES)
def base_and_input(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], torch.Tensor]:
    torch.manual_seed(1)
    make_base, size = BASES[request.param]
    return make_base, torch.randn(*size)


@pytest.mark.parametrize("tucker", [True, False])
def test_fresh_adapter_changes_nothing(config_cls: type, base_and_input: tuple, tucker: bool) -> None:
    base, x = base_and_input[0](), base_and_input[1]
    expected = base(x)
    model = make(config_cls, base, init_weights=True, use_effective_conv2d=tucker)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_unmerging_restores(
    config_cls: type, base_and_input: tuple, dtype: torch.dtype
) -> None:
    base, x = base_and_input[0]().to(dtype), base_and_input[1].to(dtype)
    plain, weight = base(x), base.weight.detach().clone()
    model = make(config_cls, base)
    expected = model(x)
    assert expected.dtype == dtype and not torch.allclose(expected, plain, atol=1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
    model.unmerge_adapter()
    torch.testing.assert_close(base.weight, weight, atol=tolerance, rtol=tolerance)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain, atol=tolerance, rtol=tolerance)


def test_two_adapters_at_once(config_cls: type, base_and_input: tuple) -> None:
    base, x = base_and_input[0](), base_and_input[1]
    plain = base(x)
    model = make(config_cls, base)
    one = model(x) - plain
    model.add_adapter("other", config_cls(r=3, alpha=2, target_modules=["0"], init_weights=False))
    model.set_adapter("other")
    other = model(x) - plain
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x) - plain, one + other, atol=1e-5, rtol=1e-4)
    names = ["default", "__base__"][: len(x)]
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed[0], (one + plain)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-5)


def test_save_and_load(config_cls: type, base_and_input: tuple, tmp_path: Path) -> None:
    make_base, x = base_and_input
    base = make_base()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = make(config_cls, base, use_effective_conv2d=True)
    model.save_pretrained(tmp_path)
    again = make_base()
    again.load_state_dict(state)
    again = PeftModel.from_pretrained(nn.Sequential(again), tmp_path).eval()
    torch.testing.assert_close(again(x), model(x))


def test_gradients_reach_the_adapter_only(config_cls: type, base_and_input: tuple) -> None:
    model, x = make(config_cls, base_and_input[0]()), base_and_input[1]
    model(x).pow(2).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in model.named_parameters() if ".hada_" in name or ".lokr_" in name}


def test_module_dropout_leaves_the_adapter_out_while_training(config_cls: type) -> None:
    model, x = make(config_cls, module_dropout=1.0), torch.randn(3, 32)
    plain = first_layer(model).base_layer(x)
    assert not torch.allclose(model(x), plain)
    torch.testing.assert_close(model.train()(x), plain)


@pytest.mark.parametrize("tokens", [1, 300])
def test_rank_dropout_drops_outputs_while_training(config_cls: type, tokens: int) -> None:
    model, x = make(config_cls, rank_dropout=0.5), torch.randn(tokens, 32)
    plain, full = first_layer(model).base_layer(x), model(x)
    dropped = torch.isclose(model.train()(x), plain, atol=1e-6).all(dim=0)
    assert 0 < dropped.sum() < 48
    torch.testing.assert_close(model.eval()(x), full)
    torch.testing.assert_close(first_layer(model).get_delta_weight("default").any(dim=1), torch.ones(48, dtype=bool))


def test_dropping_all_rows_gives_no_nan(config_cls: type) -> None:
    options = {"rank_dropout_scale": True} if config_cls is LoKrConfig else {}
    model, x = make(config_cls, rank_dropout=1.0, **options).train(), torch.randn(3, 32)
    torch.testing.assert_close(model(x), first_layer(model).base_layer(x))


def test_scaling(config_cls: type) -> None:
    layer = first_layer(make(config_cls))
    assert layer.scaling["default"] == 1.5
    layer.set_scale("default", 2)
    layer.set_scale("unknown", 2)
    layer.scale_layer(2)
    assert layer.scaling == {"default": 6.0}
    layer.unscale_layer(3)
    assert layer.scaling["default"] == 2.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.5


def test_patterns(config_cls: type) -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    config = config_cls(r=2, alpha=3, target_modules=["0", "1"], rank_pattern={"1": 1}, alpha_pattern={"0": 5})
    get_peft_model(net, config)
    assert [(layer.r["default"], layer.scaling["default"]) for layer in net] == [(2, 2.5), (1, 3.0)]


def test_base_layer_is_called_where_it_is_more_than_its_weight(config_cls: type) -> None:
    model, x = make(config_cls, r=8), torch.randn(400, 32)
    layer = first_layer(model)
    assert layer._weight_can_take_deltas(["default"], x)
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    hooked = model(x)
    handle.remove()
    assert calls
    torch.testing.assert_close(hooked, model(x), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer._weight_can_take_deltas(["default"], x)
        assert model(x).dtype == torch.bfloat16
    model.get_base_model().to(torch.bfloat16)
    assert not layer._weight_can_take_deltas(["default"], x.bfloat16())


def test_tied_head_and_embedding_stay_tied(config_cls: type) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 24, bias=False))
    net[1].weight = net[0].weight
    config = config_cls(r=2, target_modules=["1"], init_weights=False, ensure_weight_tying=True)
    model = get_peft_model(net, config).eval()
    ids = torch.arange(6)
    weight = net[1].weight + net[1].get_delta_weight("default")
    expected = weight[ids] @ weight.T
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert merged[0].weight is merged[1].weight
    torch.testing.assert_close(merged(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [0, -1])
def test_bad_rank_is_refused(config_cls: type, r: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        make(config_cls, r=r)


def test_unknown_start_is_warned_about(config_cls: type) -> None:
    with pytest.warns(PeftWarning, match="init_weights='bad'"):
        model = make(config_cls, init_weights="bad")
    assert not first_layer(model).get_delta_weight("default").any()
