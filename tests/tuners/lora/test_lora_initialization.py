# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Initialisations that read the base weights, and adapters that are converted to plain LoRA when they are saved.

What the factors should be is computed by hand, from the definitions in the papers.
"""

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    kinds,
    llama,
    logits,
    randomise,
    refused,
    seeded,
    token_ids,
    warned,
)
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.plain_lora import without_start


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

FROM_BASE = ("pissa", "pissa_niter_20", "olora")
STARTS = (*FROM_BASE, "orthogonal")
IDS = token_ids(vocabulary=12)
SETTINGS = {"r": 4, "lora_alpha": 6}


def start(init: str, target: str = "lin", **config) -> tuple[nn.Module, LoraLayer, torch.Tensor]:
    """Adapt one layer of the model of all kinds; give the model, the layer, and its weight (out, in) as it was."""
    base = kinds()
    before = base.get_submodule(target).weight.detach().clone()
    settings = {**SETTINGS, "fan_in_fan_out": target == "conv", **config}
    model = get_peft_model(base, LoraConfig(target_modules=[target], init_lora_weights=init, **settings))
    return model, base.get_submodule(target), before.T if target == "conv" else before


def factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


# ------------------------------------------------------------------------------------------ the math
@pytest.mark.parametrize("target", ["lin", "conv", "head"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", FROM_BASE)
def test_the_product_moves_from_the_weight_to_the_factors(init: str, use_rslora: bool, target: str) -> None:
    expected = logits(kinds(), IDS)
    model, layer, before = start(init, target, use_rslora=use_rslora)
    b, a = factors(layer)
    scaling = 6 / 4**0.5 if use_rslora else 6 / 4
    weight = layer.weight.detach().T if target == "conv" else layer.weight.detach()
    assert differs(weight, before)
    assert_close(weight, before - scaling * b @ a)
    assert_close(logits(model, IDS), expected)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_20"])
@pytest.mark.parametrize("target", ["lin", "conv"])
def test_pissa_takes_the_principal_part(target: str, init: str) -> None:
    _, layer, before = start(init, target)
    b, a = factors(layer)
    singular = torch.linalg.svdvals(before)
    # scaling * B A is the best approximation of rank 4, and each factor carries the root of the singular values
    assert_close(torch.linalg.svdvals(before - 1.5 * b @ a)[:-4], singular[4:], atol=1e-3)
    assert_close(a @ a.T, torch.diag(singular[:4] / 1.5), atol=1e-3)
    assert_close(b.T @ b, torch.diag(singular[:4] / 1.5), atol=1e-3)


@pytest.mark.parametrize("target", ["lin", "conv"])
def test_olora_takes_the_first_directions_of_a_qr_decomposition(target: str) -> None:
    _, layer, before = start("olora", target)
    b, a = factors(layer)
    assert_close(b.T @ b, torch.eye(4))
    assert_equal(a, a.triu())
    # the first 4 columns of W are all in Q R's first 4 columns
    assert_close((b @ a)[:, :4], before[:, :4])


@pytest.mark.parametrize("target", ["lin", "conv"])
def test_orthogonal_changes_nothing_and_trains_both_factors(target: str) -> None:
    expected = logits(kinds(), IDS)
    model, layer, before = start("orthogonal", target)
    b, a = factors(layer)
    assert_close(b @ a, torch.zeros_like(before), atol=1e-6)
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 2
    assert_close(logits(model, IDS), expected)
    model(IDS).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_randomised_decomposition_is_the_same_each_time() -> None:
    """Else an adapter would be loaded onto another weight than it was trained on."""
    first, _ = factors(start("pissa_niter_1")[1])
    torch.manual_seed(17)
    second, _ = factors(start("pissa_niter_1")[1])
    assert_equal(first, second)


def test_a_decomposition_leaves_the_random_numbers_of_the_caller_alone() -> None:
    with seeded(5):
        start("pissa_niter_1")
        after = torch.rand(3)
    with seeded(5):
        start("pissa")
        assert_equal(after, torch.rand(3))


@pytest.mark.parametrize("init", STARTS)
def test_embeddings_start_neutrally(init: str) -> None:
    expected = logits(kinds(), IDS)
    model, layer, before = start(init, "emb")
    assert_equal(layer.weight, before)
    assert_equal(logits(model, IDS), expected)


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, init: str) -> None:
    """The weight keeps its type and is rounded once; the factors are as precise as training needs them."""
    with seeded():
        net = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    before = net[0].weight.detach().clone()
    parameter = net[0].weight
    get_peft_model(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
    b, a = factors(net[0])
    assert net[0].weight is parameter
    assert parameter.dtype == dtype
    assert b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}[dtype]
    assert_close(parameter.detach().double(), before.double() - 2 * (b @ a).double(), atol=rounding)


@pytest.mark.parametrize("init", FROM_BASE)
def test_the_methods_of_a_layer_do_the_same(init: str) -> None:
    _, wanted, _ = start(init)
    layer = start("gaussian")[1]
    layer.olora_init("default") if init == "olora" else layer.pissa_init("default", init)
    for got, want in zip((*factors(layer), layer.weight), (*factors(wanted), wanted.weight), strict=True):
        assert_equal(got, want)


# ------------------------------------------------------------------------------------------ ties
def tied_linears() -> nn.Module:
    with seeded():
        net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("init", FROM_BASE)
def test_a_weight_that_others_hold_too_is_not_changed_under_them(init: str) -> None:
    net = tied_linears()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    with pytest.warns(match="share a weight"), refused(net, ValueError, init, "'0'", "'2'", "ensure_weight_tying"):
        get_peft_model(net, config)
    base = llama(tied=True)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=init)
    with pytest.warns(match="share a weight"), refused(base, ValueError, init, "lm_head", "embed_tokens"):
        get_peft_model(base, config)


@pytest.mark.parametrize("init", FROM_BASE)
def test_a_tied_weight_is_changed_once_for_members_that_follow(init: str) -> None:
    expected, x = tied_linears(), torch.ones(2, 8)
    net = tied_linears()
    parameter = net[0].weight
    model = get_peft_model(
        net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, ensure_weight_tying=True)
    )
    assert net[0].weight is net[2].weight is parameter
    assert differs(parameter, expected[0].weight)
    assert_close(logits(model, x), logits(expected, x))
    merged = model.merge_and_unload()
    assert merged[0].weight is merged[2].weight
    assert_close(merged[0].weight, expected[0].weight)


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("init", FROM_BASE)
def test_nothing_is_changed_if_a_later_target_is_refused(init: str) -> None:
    base = kinds()
    with refused(base, ValueError, "norm", "LayerNorm"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["lin", "norm"], init_lora_weights=init))
    with refused(base, ValueError, "'head'", "rank 5", "rank_pattern"):
        get_peft_model(base, LoraConfig(r=5, target_modules=["lin", "head"], init_lora_weights=init))


@pytest.mark.parametrize("init", FROM_BASE)
def test_nothing_is_changed_if_a_checkpoint_is_refused(init: str, tmp_path: Path) -> None:
    start(init)[0].save_pretrained(tmp_path)
    other = LoraConfig.from_pretrained(tmp_path)
    other.r = 3
    base = kinds()
    with refused(base, RuntimeError, "another shape"):
        PeftModel.from_pretrained(base, tmp_path, config=other)


@pytest.mark.parametrize("init", FROM_BASE)
def test_weights_that_cannot_be_factorised(init: str) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    whole = nn.Sequential(nn.Linear(4, 4))
    whole[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with refused(whole, TypeError, init, "int8", "float32"):
        get_peft_model(whole, config)
    with refused(None, ValueError, init, "meta"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), config)


def test_orthogonal_needs_an_even_rank() -> None:
    base = kinds()
    with refused(base, ValueError, "orthogonal", "even", "3"):
        get_peft_model(base, LoraConfig(r=3, target_modules=["lin"], init_lora_weights="orthogonal"))


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 6, 3), nn.MultiheadAttention(8, 2)], ids=["conv", "attention"])
def test_kinds_that_are_no_matrices(layer: nn.Module, init: str) -> None:
    net = nn.Sequential(copy.deepcopy(layer))
    with refused(net, ValueError, "'0'", init, type(layer).__name__):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))


def test_orthogonal_convolutions() -> None:
    with seeded():
        net, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 5, 5)
    expected = net(x)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal"))
    assert_close(model(x), expected)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with refused(net, ValueError, "orthogonal", "groups"):
        get_peft_model(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal"))


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_4", "orthonormal"])
def test_names_that_mean_nothing(name: str) -> None:
    base = kinds()
    with refused(base, ValueError, name, "pissa_niter_N"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["lin"], init_lora_weights=name))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_other_adapters_stand_on_the_weights(init: str) -> None:
    """What changes base weights is said to those who stand on them, whoever came first."""
    special, plain = (LoraConfig(r=2, target_modules=["lin"], init_lora_weights=name) for name in (init, True))
    model, _, _ = start("gaussian")
    with warned(init, "default", "path_initial_model_for_weight_conversion"):
        model.add_adapter("other", special)
    model, _, _ = start(init)
    with refused(model, RuntimeError, "changed by adapter 'default'", "load the base model again"):
        model.add_adapter("other", special)
    with warned("'default'", "changed the base weights", "path_initial_model_for_weight_conversion"):
        model.add_adapter("other", plain)
    assert model.base_model.model.lin.available_adapters == {"default", "other"}
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["head"]))


# ------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_loading_takes_the_same_out_of_the_base(init: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, layer, _ = start(init)
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kinds(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(again.base_model.model.lin.weight, layer.weight)
    assert_equal(logits(again, IDS), logits(model, IDS))


CONVERSIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"conv": 3}, "alpha_pattern": {"head": 10}},
}


@pytest.mark.parametrize("option", CONVERSIONS)
@pytest.mark.parametrize("init", (*STARTS, True))
def test_conversion_on_save(init: str | bool, option: str, tmp_path: Path) -> None:
    """What is saved fits the base model as it was, and gives the same outputs there."""
    base = kinds()
    settings = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": False, **CONVERSIONS[option]}
    if init == "orthogonal" and option == "patterns":
        settings["rank_pattern"] = {"conv": 2}
    targets = ["emb", "conv", "lin", "head"]
    model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=init, **settings))
    model.save_pretrained(tmp_path / "start")
    randomise(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].init_lora_weights == init

    config = LoraConfig.from_pretrained(tmp_path / "plain")
    assert (config.r, config.init_lora_weights) == (8, True)
    assert config.lora_alpha == pytest.approx(6 * 2**0.5 if option == "rslora" else 12)
    again = PeftModel.from_pretrained(kinds(), tmp_path / "plain")
    layers = [again.base_model.model.get_submodule(name) for name in targets]
    live = [base.get_submodule(name) for name in targets]
    assert [layer.r["default"] for layer in layers] == [2 * layer.r["default"] for layer in live]
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([x.scaling["default"] for x in live])
    assert_close(logits(again, IDS), logits(model, IDS), atol=1e-4)
    with again.disable_adapter():
        assert_equal(logits(again, IDS), logits(kinds(), IDS))


def test_conversion_keeps_ties(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa", ensure_weight_tying=True)
    model = get_peft_model(tied_linears(), config)
    model.save_pretrained(tmp_path / "start")
    randomise(model)
    for deduplicate in (False, True):
        folder = tmp_path / f"plain{deduplicate}"
        model.save_pretrained(
            folder, path_initial_model_for_weight_conversion=tmp_path / "start", deduplicate_tied=deduplicate
        )
        again = PeftModel.from_pretrained(tied_linears(), folder)
        assert_close(logits(again, torch.ones(1, 8)), logits(model, torch.ones(1, 8)))


def test_subtracting_an_adapter_of_the_model() -> None:
    model, _, _ = start("gaussian")
    model.add_adapter("start", LoraConfig(target_modules=["lin"], **SETTINGS))
    randomise(model)
    tensors = get_peft_model_state_dict(model, adapter_name="default")
    initial = get_peft_model_state_dict(model, adapter_name="start")
    converted = model.subtract_mutated_init(tensors, "start")
    a, b = (converted[f"base_model.model.lin.lora_{side}.weight"] for side in "AB")
    a1, b1 = (tensors[f"base_model.model.lin.lora_{side}.weight"] for side in "AB")
    a0, b0 = (initial[f"base_model.model.lin.lora_{side}.weight"] for side in "AB")
    assert_close(b @ a, b1 @ a1 - b0 @ a0)


def test_conversion_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    model, _, _ = start("pissa")
    start("pissa", target="head")[0].save_pretrained(tmp_path / "other")
    start("gaussian", r=2)[0].save_pretrained(tmp_path / "smaller")
    out = tmp_path / "out"
    for folder, mentions in (("other", ("lin.lora_A", "is missing")), ("smaller", ("(2, 10)", "(4, 10)"))):
        with refused(model, ValueError, "initial adapter", *mentions, folder=tmp_path):
            model.save_pretrained(out, path_initial_model_for_weight_conversion=tmp_path / folder)
    with refused(model, ValueError, "adapter_model.safetensors", folder=tmp_path):
        (tmp_path / "empty").mkdir(exist_ok=True)
        model.save_pretrained(out, path_initial_model_for_weight_conversion=tmp_path)


def test_conversion_refuses_scalings_that_it_cannot_keep(tmp_path: Path) -> None:
    with pytest.warns(match="cannot be converted"):
        config = LoraConfig(
            target_modules=["lin"], init_lora_weights="pissa", use_rslora=True, rank_pattern={"lin": 2}
        )
    model = get_peft_model(kinds(), config)
    model.save_pretrained(tmp_path / "start")
    with refused(model, ValueError, "use_rslora", "rank_pattern", folder=tmp_path):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")


def test_further_tensors_pass_through() -> None:
    tensors = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(3, 1), "head.weight": torch.ones(2)}
    converted = without_start(tensors, tensors)
    assert_equal(converted["head.weight"], tensors["head.weight"])
    assert_equal(converted["x.lora_B.weight"] @ converted["x.lora_A.weight"], torch.zeros(3, 2))
