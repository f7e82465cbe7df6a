# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA against its formulas, written out by hand; what holds for other methods too is in test_methods.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, llama, logits, refused, seeded, stack, token_ids, warned
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import AdaLoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer, RankAllocator, SVDConv2d, SVDLinear
from peft.tuners.lora import LoraLayer


TARGETS = ["layers.0.up", "layers.0.down"]


def config(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 12, "target_modules": TARGETS, **changes})


def adapted(net: nn.Module | None = None, **changes: Any) -> PeftModel:
    """Adapt `stack`, with values that all have an effect."""
    with seeded():
        model = get_peft_model(stack(1) if net is None else net, config(**changes)).eval()
    with seeded(2), torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    return {
        name: module for name, module in model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)
    }


def samples(step: int = 0) -> torch.Tensor:
    with seeded(step):
        return torch.randn(6, 8)


def train(model: PeftModel, steps: int, first: int = 0) -> None:
    """Train as a user would: the ranks are handed out after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in range(first, first + steps):
        model(samples(step)).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ the layers
@pytest.mark.parametrize(
    ("base", "x", "layer_cls"),
    [
        (nn.Linear(6, 5), torch.randn(2, 3, 6), SVDLinear),
        (Conv1D(5, 6), torch.randn(2, 3, 6), SVDLinear),
        (nn.Conv2d(4, 6, (3, 1), padding=1), torch.randn(2, 4, 5, 5), SVDConv2d),
        (nn.Conv2d(4, 6, 3, groups=2, dilation=2), torch.randn(2, 4, 5, 5), SVDConv2d),
    ],
)
@pytest.mark.parametrize("alpha", [8, 0])
def test_delta_is_b_diag_e_a(base: nn.Module, x: torch.Tensor, layer_cls: type, alpha: int) -> None:
    transposed = isinstance(base, Conv1D)
    model = adapted(
        nn.Sequential(copy.deepcopy(base)), target_modules=["0"], lora_alpha=alpha, fan_in_fan_out=transposed
    )
    layer = model.get_base_model()[0]
    assert type(layer) is layer_cls and isinstance(layer, LoraLayer)
    a, b, e = (getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_E"))
    # alpha / rank, and the rank itself in the place of an alpha that is 0
    delta = (alpha or 4) / 4 * b @ torch.diag(e.flatten()) @ a
    expected = delta.T if transposed else delta.view(base.weight.shape)
    assert_close(layer.get_delta_weight("default"), expected)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.weight.add_(expected)
    assert_close(model(x), changed(x))


def test_fresh_adapter_has_no_singular_values() -> None:
    model = get_peft_model(stack(1), config(init_r=64))
    layer = layers(model)["layers.0.up"]
    assert not layer.lora_E["default"].any()
    for name in ("lora_A", "lora_B"):
        assert 0.015 < getattr(layer, name)["default"].std() < 0.025
    assert_equal(model(samples()), stack(1)(samples()))
    random = layers(get_peft_model(stack(1), config(init_r=64, init_lora_weights=False)))["layers.0.up"]
    assert all(0.7 < getattr(random, name)["default"].std() < 1.3 for name in ("lora_A", "lora_B", "lora_E"))


def test_dropout_is_on_the_input() -> None:
    model = adapted(lora_dropout=1.0).train()  # everything is dropped
    assert_equal(model(samples()), stack(1)(samples()))


def test_ranknum_is_kept_and_not_trained() -> None:
    layer = layers(adapted())["layers.0.up"]
    assert layer.ranknum["default"].item() == 4 and not layer.ranknum["default"].requires_grad
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 24
    layer.unscale_layer()
    assert layer.scaling["default"] == 8


# ------------------------------------------------------------------------------------------ the penalty
@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_loss_has_the_penalty(weight: float) -> None:
    ids = token_ids()
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "orth_reg_weight": weight}
    model = get_peft_model(llama(), AdaLoraConfig(init_r=3, target_r=1, total_step=9, **settings))
    plain = llama()(ids, labels=ids).loss
    distances = []
    for layer in layers(model).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        distances += [torch.linalg.norm(product - torch.eye(3)) for product in (a @ a.T, b.T @ b)]
    assert_close(model(ids, labels=ids).loss, plain + weight * sum(distances) / len(distances))
    assert model(ids).loss is None
    with model.disable_adapter():
        assert_close(model(ids, labels=ids).loss, plain)
    model(ids, labels=ids).loss.backward()
    assert all(bool(layer.lora_A["default"].grad.any()) == bool(weight) for layer in layers(model).values())


# ------------------------------------------------------------------------------------------ handing out ranks
def test_budget_falls_with_the_third_power() -> None:
    allocator = adapted(tinit=2, tfinal=2, deltaT=3).base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (8, 4)
    found = [allocator.budget_schedule(step) for step in range(14)]
    assert found[:3] == [(8, False)] * 3
    for step in range(3, 11):
        left = (10 - step) / 8
        assert found[step] == (int(4 * left**3 + 4), step % 3 == 0)
    assert found[11:] == [(4, True)] * 3
    allocator.set_total_step(20)
    assert allocator.budget_schedule(8)[0] == int(4 * (10 / 16) ** 3 + 4)
    assert allocator.budget_schedule(18) == (4, True)


def test_importance_is_smoothed_sensitivity_times_uncertainty() -> None:
    model = adapted(beta1=0.7, beta2=0.6)
    net, allocator = model.get_base_model(), model.base_model.rankallocator
    averages, variations = {}, {}
    for step in range(3):
        model.zero_grad()
        model(samples(step)).pow(2).mean().backward()
        allocator.update_ipt(net)
        for name, parameter in net.named_parameters():
            if ".lora_" in name:
                now = (parameter * parameter.grad).abs()
                averages[name] = 0.7 * averages.get(name, 0) + 0.3 * now
                variations[name] = 0.6 * variations.get(name, 0) + 0.4 * (now - averages[name]).abs()
    assert set(allocator.exp_avg_ipt) == set(averages)
    for name in averages:
        assert_close(allocator.exp_avg_ipt[name], averages[name], atol=1e-8)
        assert_close(allocator.exp_avg_unc[name], variations[name], atol=1e-8)
    scores = {name: averages[name] * variations[name] for name in averages}
    ranks = [
        (
            scores[f"{target}.lora_E.default"][i, 0]
            + scores[f"{target}.lora_A.default"][i].mean()
            + scores[f"{target}.lora_B.default"][:, i].mean()
        ).item()
        for target in TARGETS
        for i in range(4)
    ]
    pattern = allocator.mask_to_budget(net, 3)
    best = sorted(ranks)[-3:]
    assert pattern == {f"{t}.lora_E": [ranks[4 * n + i] in best for i in range(4)] for n, t in enumerate(TARGETS)}
    for target in TARGETS:
        values = net.get_submodule(target).lora_E["default"].flatten()
        assert (values != 0).tolist() == pattern[f"{target}.lora_E"]


def test_nothing_is_taken_away_before_its_time() -> None:
    model = adapted(tinit=4, tfinal=2, deltaT=2)
    train(model, 5)
    assert model.peft_config["default"].rank_pattern is None
    assert all(layer.lora_E["default"].all() for layer in layers(model).values())
    train(model, 2, first=5)
    assert not all(layer.lora_E["default"].all() for layer in layers(model).values())


def test_mask_keeps_all_where_the_budget_allows_it() -> None:
    model = adapted()
    pattern = model.base_model.rankallocator.mask_to_budget(model.get_base_model(), 8)
    assert all(all(mask) for mask in pattern.values())


def test_ranks_are_settled_in_the_end(tmp_path: Path) -> None:
    model = adapted(tinit=2, tfinal=3, deltaT=2)
    train(model, 9)
    assert model.peft_config["default"].rank_pattern is None  # an entry that is zero now may come back
    train(model, 3, first=9)
    pattern = model.peft_config["default"].rank_pattern
    assert set(pattern) == {f"{target}.lora_E" for target in TARGETS}
    assert sum(map(sum, pattern.values())) == 4
    for name, layer in layers(model).items():
        mask = pattern[f"{name}.lora_E"]
        assert (layer.lora_E["default"].flatten() != 0).tolist() == mask
        assert layer.ranks_left["default"] == mask
    tensors = get_peft_model_state_dict(model)
    for name, mask in ((name, pattern[f"{name}.lora_E"]) for name in TARGETS):
        assert tensors[f"base_model.model.{name}.lora_A"].shape[0] == sum(mask)
        assert tensors[f"base_model.model.{name}.lora_B"].shape[1] == sum(mask)
        assert tensors[f"base_model.model.{name}.lora_E"].shape[0] == sum(mask)
    # the file has what is left, and computes the same
    expected = logits(model.eval(), samples())
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(stack(1), tmp_path, **options).eval()
        assert_close(logits(again, samples()), expected, atol=1e-6)
        assert again.peft_config["default"].rank_pattern == pattern
        for name, layer in layers(again).items():
            assert layer.lora_E["default"].shape[0] == layer.r["default"] == sum(pattern[f"{name}.lora_E"])
            assert layer.ranknum["default"].item() == 4
    # what was read is written again, and what was written goes back into the model that still has all ranks
    again.save_pretrained(tmp_path / "again")
    assert get_peft_model_state_dict(again).keys() == tensors.keys()
    for key, tensor in get_peft_model_state_dict(again).items():
        assert_equal(tensor, tensors[key])
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].zero_()
    set_peft_model_state_dict(model, tensors)
    assert_close(logits(model, samples()), expected, atol=1e-6)


def test_training_goes_on_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    model = adapted(tinit=2, tfinal=3)
    train(model, 12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(1), tmp_path, is_trainable=True)
    assert again.base_model.rankallocator.init_bgt == 4
    before = again.peft_config["default"].rank_pattern
    again.peft_config["default"].target_r = 1
    again.base_model.rankallocator.target_bgt = 2
    train(again, 12)
    after = again.peft_config["default"].rank_pattern
    assert sum(map(sum, after.values())) == 2
    assert all(len(mask) == 4 for mask in after.values())
    assert all(old or not new for key in after for old, new in zip(before[key], after[key], strict=True))
    again.save_pretrained(tmp_path)
    third = PeftModel.from_pretrained(stack(1), tmp_path).eval()
    assert_close(logits(third, samples()), logits(again.eval(), samples()), atol=1e-6)


def test_resizing_by_a_pattern() -> None:
    model = adapted()
    pattern = {"layers.0.up.lora_E": [True, False, False, True]}
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    resized = model.base_model.resize_state_dict_by_rank_pattern(pattern, expected, "default")
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    for name, tensor in get_peft_model_state_dict(model).items():
        assert_equal(tensor, resized[name])
    layer = layers(model)["layers.0.up"]
    assert layer.lora_A["default"].shape == (2, 8) and layer.lora_A["default"].requires_grad
    assert_equal(layer.lora_B["default"], expected["base_model.model.layers.0.up.lora_B"][:, [0, 3]])
    with refused(model, ValueError, "4 ranks", "2"):
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")


def test_a_layer_can_lose_all_its_ranks() -> None:
    model = adapted()
    pattern = {"layers.0.up.lora_E": [False] * 4}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    layer = layers(model)["layers.0.up"]
    assert not layer.get_delta_weight("default").any()
    model(samples()).sum().backward()
    model.base_model.update_and_allocate(12)
    assert model.peft_config["default"].rank_pattern["layers.0.up.lora_E"] == [False] * 4


# ------------------------------------------------------------------------------------------ several adapters
def test_one_adapter_is_trained() -> None:
    model = adapted()
    with refused(model, ValueError, "'default' and 'other'", "inference_mode=True"):
        model.add_adapter("other", config())
    model.add_adapter("other", config(init_r=2, inference_mode=True))
    assert model.base_model.trainable_adapter_name == "default"
    assert [p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_E.other")] == [2, 2]
    train(model, 13)
    assert all(layer.ranks_left.keys() == {"default"} for layer in layers(model).values())
    with warned("'other' is active now"):
        model.delete_adapter("default")
    assert model.base_model.rankallocator is None
    with refused(model, ValueError, "inference_mode"):
        model.base_model.update_and_allocate(1)


def test_adapters_cannot_be_combined() -> None:
    model = adapted()
    with refused(model, TypeError, "add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "both")


# ------------------------------------------------------------------------------------------ ties
def test_an_embedding_follows_the_head() -> None:
    net = llama(tied=True)
    settings = {"init_r": 3, "target_r": 1, "total_step": 9, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(net, AdaLoraConfig(ensure_weight_tying=True, init_lora_weights=False, **settings)).eval()
    head = model.get_base_model().lm_head
    assert head.weight is model.get_base_model().model.embed_tokens.get_base_layer().weight
    expected = llama(tied=True)
    with torch.no_grad():
        expected.lm_head.weight.add_(head.get_delta_weight("default"))
    assert_close(logits(model, token_ids()), logits(expected, token_ids()), atol=1e-4)
    model(token_ids(), labels=token_ids()).loss.backward()
    model.base_model.update_and_allocate(9)
    assert list(model.peft_config["default"].rank_pattern) == ["lm_head.lora_E"]
    pruned = logits(model, token_ids())
    assert_close(logits(model.merge_and_unload(), token_ids()), pruned, atol=1e-4)


# ------------------------------------------------------------------------------------------ input that cannot work
@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"total_step": None}, "total_step"),
        ({"total_step": 0}, "total_step"),
        ({"tinit": 6, "tfinal": 6}, "tfinal"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_config_refuses(changes: dict[str, Any], mentions: str) -> None:
    with pytest.raises(ValueError, match=mentions):
        config(**changes)


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_rank_must_be_positive(rank: Any) -> None:
    net = stack(1)
    with refused(net, ValueError, "init_r", str(rank)):
        get_peft_model(net, config(init_r=rank))


def test_what_has_no_effect_is_said() -> None:
    with warned("r=3", "init_r"):
        config(r=3)
    with warned("use_rslora", "no effect"):
        get_peft_model(stack(1), config(use_rslora=True))


def test_allocator_of_a_model_without_layers() -> None:
    allocator = RankAllocator(nn.Sequential(), config(), "default")
    assert (allocator.init_bgt, allocator.target_bgt) == (0, 0)


# ------------------------------------------------------------------------------------------ what clients replace
def budget_of_a_client(allocator: RankAllocator, model: nn.Module, budget: int) -> dict[str, list[bool]]:
    """Choose ranks as clients do that replace `mask_to_budget`: by names of parameters, which have the adapter's."""
    ending = f".lora_E.{allocator.adapter_name}"
    values = {name: value for name, value in model.named_parameters() if name.endswith(ending)}
    scores = {}
    for name in values:
        vectors = [
            allocator._element_score(name.replace("lora_E", factor)).mean(axis)
            for factor, axis in (("lora_A", 1), ("lora_B", 0))
        ]
        scores[name] = allocator._combine_ipt(allocator._element_score(name), torch.stack(vectors, dim=1))
    threshold = torch.cat(list(scores.values())).kthvalue(allocator.init_bgt - budget).values
    with torch.no_grad():
        for name, value in values.items():
            value[scores[name] <= threshold] = 0
    return {name: (score > threshold).tolist() for name, score in scores.items()}


def test_a_client_hands_out_the_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = adapted(tinit=1, tfinal=3)
    train(expected, 12)
    monkeypatch.setattr(RankAllocator, "mask_to_budget", budget_of_a_client)
    model = adapted(tinit=1, tfinal=3)
    train(model, 12)
    assert model.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern
    assert_close(model(samples()), expected(samples()))
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(stack(1), tmp_path)(samples()), expected(samples()))


def test_importances_are_not_known_before_a_backward_pass() -> None:
    allocator = adapted().base_model.rankallocator
    assert allocator.adapter_name == "default" and allocator.init_bgt == 4 * len(TARGETS)
    with refused(None, KeyError, "layers.0.up.lora_A.default", "no factor yet", "update_ipt"):
        allocator._element_score("layers.0.up.lora_A.default")
