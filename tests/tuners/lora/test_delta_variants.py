# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the variants of LoRA have in common that add a delta to the weight: all stages that an adapter goes through."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, features, logits, randomise, refused, stack, warned
from torch import nn

from peft import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

# name -> what asks for it
VARIANTS: dict[str, dict[str, Any]] = {
    "KaSA": {"kasa_config": KasaConfig()},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["head"], target_modules_bd_b=["up"], nblocks=2)},
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": 4},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "VeLoRA, one direction": {"velora_config": VeloraConfig(num_groups=3, init_type="random")},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=3)},
}
# those that take something out of the base weight, which is what is left when they are off
CHANGE_BASE = {"KaSA"}

# those whose factors are not kept as the matrices whose product is the delta
WRITTEN_OUT = {"KaSA", "BD-LoRA", "QA-LoRA"}
# those that have tensors or blocks for each rank beside the factors
WITHOUT_ROOM = {"KaSA", "BD-LoRA", "MonteCLoRA"}

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["up", "head"], **VARIANTS[variant], **changes})


def adapted(variant: str, **changes: Any) -> PeftModel:
    """`stack` with an adapter whose tensors all have an effect."""
    torch.manual_seed(3)
    model = get_peft_model(stack(), config(variant, **changes)).eval()
    randomise(model)
    return model


@each_variant
def test_the_output_is_that_of_the_weight_with_the_delta(variant: str) -> None:
    model, expected = adapted(variant), stack()
    layers = {"layers.0.up", "layers.1.up", "layers.2.up", "head"}
    for name in layers:
        layer = model.get_base_model().get_submodule(name)
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.weight.shape and delta.abs().max() > 0.01
        expected.get_submodule(name).weight.data = (layer.get_base_weight() + delta).detach()
    assert_close(logits(model, features()), logits(expected, features()))
    assert differs(logits(model, features()), logits(stack(), features()))


@each_variant
def test_merging_and_back(variant: str) -> None:
    model = adapted(variant)
    x, with_adapter = features(), logits(adapted(variant), features())
    with model.disable_adapter():
        off = logits(model, x)
    assert differs(off, with_adapter)
    if variant not in CHANGE_BASE:
        assert_equal(off, logits(stack(), x))
    model.merge_adapter()
    assert_close(logits(model, x), with_adapter)
    model.unmerge_adapter()
    assert_close(logits(model, x), with_adapter)
    with model.disable_adapter():
        assert_close(logits(model, x), off)
    assert_close(logits(copy.deepcopy(model).unload(), x), off)
    assert_close(logits(model.merge_and_unload(safe_merge=True), x), with_adapter)


@each_variant
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files(variant: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(variant)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert again.peft_config["default"] == PeftModel.from_pretrained(stack(), tmp_path).peft_config["default"]
    assert_equal(logits(again, features()), logits(model, features()))
    with again.disable_adapter(), model.disable_adapter():
        assert_equal(logits(again, features()), logits(model, features()))
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)


@each_variant
def test_copies(variant: str) -> None:
    model = adapted(variant)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(other, features()), logits(model, features()))
        randomise(other, seed=8)
        assert differs(logits(other, features()), logits(model, features()))


@each_variant
def test_all_that_is_trained_gets_gradients(variant: str) -> None:
    model = adapted(variant).train()
    model(features()).square().mean().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) >= 8
    assert [name for name, p in trained if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@each_variant
def test_several_adapters(variant: str) -> None:
    model = adapted(variant)
    x, first = features(4), logits(adapted(variant), features(4))
    model.add_adapter("second", config(variant, r=2, lora_alpha=2))
    randomise(model, "second", seed=5)
    model.set_adapter("second")
    second = logits(model, x)
    with model.disable_adapter():
        off = logits(model, x)
    assert differs(first, second)
    mixed = logits(model, x, adapter_names=["second", "default", "__base__", "second"])
    assert_close(mixed, torch.stack([second[0], first[1], off[2], second[3]]))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, x)
    model.merge_adapter(["second"])
    assert_close(logits(model, x), both)
    model.merge_adapter(["default"])
    assert_close(logits(model, x), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("second")
    assert_close(logits(model, x), first)
    assert not [name for name in model.state_dict() if "second" in name]


@each_variant
def test_options_of_lora_beside_it(variant: str) -> None:
    model = adapted(variant, lora_bias=True, use_rslora=True, rank_pattern={"head": 3 if variant == "KaSA" else 4})
    assert model.base_model.model.head.r == {"default": model.base_model.model.head.lora_A["default"].weight.shape[0]}
    expected = logits(model, features())
    assert_close(logits(model.merge_and_unload(), features()), expected)
    dropped = adapted(variant, lora_dropout=0.5)
    assert_equal(logits(dropped, features()), logits(adapted(variant), features()))
    assert differs(logits(dropped.train(), features()), logits(adapted(variant), features()))


@each_variant
def test_half_precision(variant: str) -> None:
    model = get_peft_model(stack().bfloat16(), config(variant)).eval()
    randomise(model)
    x = features().bfloat16()
    result = logits(model, x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model.merge_and_unload(), x), result, rtol=5e-2, atol=5e-2)


class Twins(nn.Module):
    """Two linear layers that hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.head.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(x)))


@each_variant
def test_ties(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Twins().eval()
    model = get_peft_model(copy.deepcopy(base), config(variant, ensure_weight_tying=True)).eval()
    randomise(model)
    x, inner = features(), model.get_base_model()
    assert inner.head.source("default") is inner.up
    weight = inner.up.get_base_weight() + inner.up.get_delta_weight("default")
    expected = nn.functional.linear(torch.tanh(x @ weight.T), weight, inner.head.bias).detach()
    assert_close(logits(model, x), expected)
    model(x).square().mean().backward()
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), x), expected)
    model.merge_adapter()
    assert_close(logits(model, x), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.up.weight
    assert_close(logits(merged, x), expected)


@each_variant
@pytest.mark.parametrize(
    ("target", "options"),
    [
        (nn.Embedding(16, 16), {}),
        (nn.Conv2d(16, 16, 1), {}),
        (nn.MultiheadAttention(16, 2), {}),
        (nn.Linear(16, 16), {"use_dora": True}),
        (nn.Linear(16, 16), {"target_modules": [], "target_parameters": ["head.weight"]}),
    ],
    ids=["embedding", "convolution", "attention", "with DoRA", "parameter"],
)
def test_where_it_does_not_exist_it_is_refused(variant: str, target: nn.Module, options: dict[str, Any]) -> None:
    net = nn.ModuleDict({"head": target})
    with refused(net, ValueError):
        get_peft_model(net, config(variant, **{"target_modules": ["head"], **options}))


@each_variant
def test_conversion_to_plain_lora(variant: str) -> None:
    model = adapted(variant)
    if variant in CHANGE_BASE:
        with refused(model, TypeError):
            convert_to_lora(model, 4)
        return
    with warned("is LoRA already"):
        plain, tensors = convert_to_lora(model, 4)
    again = get_peft_model(stack(), plain).eval()
    set_peft_model_state_dict(again, tensors)
    assert again.base_model.model.head.variants == {}
    assert_close(logits(again, features()), logits(model, features()), atol=1e-4)


@each_variant
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_weighted_sum_with_a_plain_adapter_is_plain_lora(variant: str, kind: str) -> None:
    model = adapted(variant)
    if variant in CHANGE_BASE:
        with refused(model, ValueError, "cannot be combined"):
            model.add_weighted_adapter(["default"], [1.0], "sum", kind)
        return
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["up", "head"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "plain"], [0.5, -2.0], "sum", kind, svd_rank=6)
    layer = model.base_model.model.head
    assert "sum" not in layer.variants and "default" in layer.variants
    expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("plain")
    assert_close(layer.get_delta_weight("sum"), expected)


@each_variant
@pytest.mark.parametrize("how", ["LoRA-FA", "Riemannian"])
def test_optimisers_that_look_at_factors_leave_other_forms_alone(variant: str, how: str) -> None:
    model = adapted(variant).train()
    keeps = model.base_model.model.head.keeps_matrices("default")
    assert keeps == (variant not in WRITTEN_OUT)
    if not keeps:
        with refused(model, ValueError):
            make_optimizer(how, model)
        return
    before = model.base_model.model.head.lora_B["default"].weight.clone()
    optimizer = make_optimizer(how, model)
    model(features()).square().mean().backward()
    optimizer.step()
    assert differs(model.base_model.model.head.lora_B["default"].weight, before)


def make_optimizer(how: str, model: PeftModel) -> torch.optim.Optimizer:
    if how == "LoRA-FA":
        return create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.1)
    return create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)


@each_variant
def test_hotswapping(variant: str, tmp_path: Path) -> None:
    model, other = adapted(variant), adapted(variant)
    randomise(other, seed=9)
    other.save_pretrained(tmp_path)
    assert differs(logits(model, features()), logits(other, features()))
    prepare_model_for_compiled_hotswap(model)
    hotswap_adapter(model, tmp_path, "default")
    assert_close(logits(model, features()), logits(other, features()))
    plain = get_peft_model(stack(), LoraConfig(r=2, lora_alpha=6, target_modules=["up", "head"]))
    with refused(plain, ValueError, "the two adapters differ in"):
        hotswap_adapter(plain, tmp_path, "default")


@each_variant
def test_room_for_greater_ranks(variant: str) -> None:
    model = adapted(variant)
    x, expected = features(), logits(model, features())
    if variant in WITHOUT_ROOM:
        with refused(model, ValueError, "have no room for other ranks"):
            prepare_model_for_compiled_hotswap(model, target_rank=4)
        return
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_close(logits(model, x), expected)
    model.train()(x).square().sum().backward()
    model.eval().merge_adapter()
    assert_close(logits(model, x), expected)
