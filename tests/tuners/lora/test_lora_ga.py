# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA-GA: factors from gradients, and the model that they were taken from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    gpt2,
    linears,
    llama,
    logits,
    refused,
    seeded,
    token_ids,
    warned,
)
from torch import nn

from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

DIRECTIONS = ["ArBr", "A2rBr", "ArB2r", "random"]
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]
GRADIENT = "_peft_loraga_grad"


def config(targets: list[str] | None = None, r: int = 2, **settings) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=6,
        target_modules=targets or ["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**settings),
    )


def inputs() -> torch.Tensor:
    with seeded(3):
        return torch.randn(20, 8)


def steps(net: nn.Module, times: int = 1) -> Callable[[], None]:
    def train_step() -> None:
        for _ in range(times):
            net(inputs()).pow(2).mean().backward()

    return train_step


def gradient(net: nn.Module, name: str = "0.weight") -> torch.Tensor:
    weight = net.get_parameter(name)
    return torch.autograd.grad(net(inputs()).pow(2).mean(), weight)[0]


# ------------------------------------------------------------------------------------------ the math
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_factors_lie_along_directions_of_the_gradient(direction: str, scale: str) -> None:
    net = linears(8, 6)
    u, s, vh = torch.linalg.svd(gradient(net), full_matrices=False)
    before, expected = net[0].weight.detach().clone(), net(inputs())
    preprocess_loraga(net, config(["0"], direction=direction, scale=scale), steps(net))
    model = get_peft_model(net, config(["0"], direction=direction, scale=scale))
    layer = net[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    of_a, of_b = {"ArBr": ([1, 3], [0, 2]), "A2rBr": ([2, 3], [0, 1]), "ArB2r": ([0, 1], [2, 3])}.get(
        direction, (None, None)
    )
    if of_a is None:  # the directions in which the gradient's A is are drawn
        of_a = of_b = (vh @ (a / a.norm(dim=1, keepdim=True)).T).abs().argmax(0).tolist()
        assert set(of_a) <= set(range(4))
    factor_of_a, factor_of_b = {
        "stable": (1, 6**0.25 / 16**0.5),
        "weight_svd": (1, (torch.linalg.svdvals(before)[0] / s[of_b[0]]).item()),
        "gd_scale": (1 / 3, 1 / 3),
        "unit": (1, 1),
    }[scale]
    assert_close((a / factor_of_a * vh[of_a]).sum(1).abs(), torch.ones(2), atol=1e-3)
    assert_close(a.norm(dim=1), torch.full((2,), float(factor_of_a)), atol=1e-4)
    assert_close((b * u[:, of_b]).sum(0).abs(), s[of_b] * factor_of_b, atol=1e-3)
    assert_close(layer.weight, before - 3 * b @ a)
    assert_close(model(inputs()), expected, atol=1e-4)
    assert not hasattr(layer.base_layer, GRADIENT)


def test_gradients_are_the_mean_over_backward_passes() -> None:
    net = linears(8, 6, 4)
    expected = gradient(net)
    preprocess_loraga(net, config(["0"]), steps(net, times=3))
    assert_close(getattr(net[0], GRADIENT), expected, atol=1e-6)
    assert not hasattr(net[1], GRADIENT)


def test_transposed_linear_layers_and_half_precision() -> None:
    for net, targets in ((gpt2(), ["c_attn", "c_proj"]), (llama().bfloat16(), ["q_proj", "down_proj"])):
        lora_config = config(targets)
        lora_config.fan_in_fan_out = "c_attn" in targets
        expected = logits(net, token_ids())
        preprocess_loraga(net, lora_config, lambda net=net: net(token_ids()).logits.float().pow(2).mean().backward())
        model = get_peft_model(net, lora_config)
        assert_close(
            logits(model, token_ids()).float(), expected.float(), atol=0.05 if net.dtype.itemsize == 2 else 1e-4
        )


def test_the_random_numbers_of_the_caller_are_left_alone() -> None:
    net = linears(8, 6)
    preprocess_loraga(net, config(["0"], direction="random", scale="weight_svd"), steps(net))
    with seeded(5):
        LoraConfig(target_modules=["0"])
        get_peft_model(linears(8, 6), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        after = torch.rand(2)
    with seeded(5):
        get_peft_model(net, config(["0"], direction="random", scale="weight_svd"))
        assert_equal(after, torch.rand(2))


# ------------------------------------------------------------------------------------------ the model, ties
def test_the_model_is_left_as_it_was_but_for_the_gradients() -> None:
    net = linears(8, 6, 4)
    net[0].bias.requires_grad_(False)
    net.eval()
    net[1].train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    preprocess_loraga(net, config(["0"]), steps(net))
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
    assert [module.training for module in net.modules()] == [False, False, True]
    assert_equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert net[1].weight.grad is None
    assert not any(module._forward_hooks for module in net.modules())


def test_only_targets_are_trained_meanwhile() -> None:
    net, seen = linears(8, 6, 4), {}

    def train_step() -> None:
        seen.update((name, parameter.requires_grad) for name, parameter in net.named_parameters())
        assert net.training
        net(inputs()).pow(2).mean().backward()

    preprocess_loraga(net, config(["1"]), train_step)
    assert seen == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": False}


def test_a_tied_weight_gets_one_start_from_the_sum_over_its_uses() -> None:
    net = linears(8, 8, 8)
    net[1].weight = net[0].weight
    lora_config = config(["0", "1"])
    lora_config.ensure_weight_tying = True
    expected, whole = net(inputs()).detach(), gradient(net)
    preprocess_loraga(net, lora_config, steps(net))
    assert_close(getattr(net[0], GRADIENT), whole, atol=1e-6)
    assert not hasattr(net[1], GRADIENT)
    assert_close(get_peft_model(net, lora_config)(inputs()), expected, atol=1e-4)


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    net = linears(8, 6, 4)
    net[0].weight.requires_grad_(False)

    def train_step() -> None:
        net(inputs()).pow(2).mean().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess_loraga(net, config(["0", "1"]), train_step)
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert not any(hasattr(module, GRADIENT) for module in net.modules())


# ------------------------------------------------------------------------------------------ files
def test_a_saved_adapter_is_loaded_with_its_cache_file(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "gradients.pt"
    net = llama()
    step = lambda: net(token_ids()).logits.pow(2).mean().backward()  # noqa: E731
    preprocess_loraga(net, config(), step, cache_file=file)
    assert f"model.layers.0.self_attn.q_proj.{GRADIENT}" in torch.load(file)
    model = get_peft_model(net, config())
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = logits(model, token_ids())
    again = llama()
    preprocess_loraga(again, config(), lambda: pytest.fail("the file is there"), cache_file=file)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_close(logits(loaded, token_ids()), expected, atol=1e-4)
    plain = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    assert_close(logits(plain, token_ids()), expected, atol=1e-3)
    with warned("preprocess_loraga", "cache_file", "path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(llama(), tmp_path / "adapter")


def test_a_model_that_was_not_prepared_starts_neutrally_and_says_so() -> None:
    net = llama()
    with warned("q_proj", "init_lora_weights=True"):
        model = get_peft_model(net, config())
    assert_equal(logits(model, token_ids()), logits(llama(), token_ids()))


# ------------------------------------------------------------------------------------------ refusals
def test_refusals(tmp_path: Path) -> None:
    net = linears(8, 6)
    with refused(net, ValueError, "'lora_ga'"):
        preprocess_loraga(net, LoraConfig(target_modules=["0"]), steps(net))
    with refused(net, ValueError, "lora_ga_config"):
        preprocess_loraga(net, LoraConfig(target_modules=["0"], init_lora_weights="lora_ga"), steps(net))
    for settings, mention in (({"direction": "x"}, "ArB2r"), ({"scale": "x"}, "gd_scale"), ({"stable_gamma": 0}, "0")):
        with refused(net, ValueError, next(iter(settings)), mention):
            preprocess_loraga(net, config(["0"], **settings), steps(net))
    with refused(net, ValueError, "'0'", "r <= 3"):
        preprocess_loraga(net, config(["0"], r=4), steps(net))
    with refused(net, ValueError, "backward"):
        preprocess_loraga(net, config(["0"]), lambda: None)
    with refused(net, ValueError, "'0'", "nan"):
        preprocess_loraga(net, config(["0"]), lambda: (net(inputs()) * float("nan")).sum().backward())
    embedding = nn.Sequential(nn.Embedding(5, 4))
    with refused(embedding, ValueError, "linear"):
        preprocess_loraga(embedding, config(["0"]), lambda: None)
    other = linears(8, 7)
    preprocess_loraga(other, config(["0"]), steps(other), cache_file=tmp_path / "other.pt")
    with refused(net, ValueError, "other.pt", "(6, 8)"):
        preprocess_loraga(net, config(["0"]), steps(net), cache_file=tmp_path / "other.pt")
    preprocess_loraga(net, config(["0"]), steps(net))
    with refused(net, ValueError, "'0'", "r <= 3"):
        get_peft_model(net, config(["0"], r=4))
    with refused(net, ValueError, "lora_ga_config"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga"))
    assert get_peft_model(net, config(["0"])) is not None
