# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""MonteCLoRA: the noise while training, what is added to the loss, and the mixin that adds it in a trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_close, assert_equal, differs, features, logits, randomise, refused, stack, warned
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.lora.monteclora import BufferedMontecloraSampler, MontecloraSampler


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def adapted(**changes: Any) -> PeftModel:
    """`stack` with an adapter whose tensors all have an effect, in training mode."""
    torch.manual_seed(3)
    settings = MontecloraConfig(**{"num_samples": 3, "sample_scaler": 0.5, **changes})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["up", "head"], monteclora_config=settings)
    model = get_peft_model(stack(), config).train()
    randomise(model)
    return model


def test_the_formula() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), features(4, 6)
    settings = MontecloraConfig(num_samples=3, sample_scaler=0.5)
    get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], monteclora_config=settings))
    randomise(net)
    layer = net.train()[0]
    sampler = layer.lora_monteclora_sampler["default"]
    torch.manual_seed(7)
    result = layer(x)
    torch.manual_seed(7)
    g, square = torch.randn(3), torch.randn(2, 2)
    noise = torch.randn(3, 6, 2)
    h = torch.stack([square[:, 0] @ square[:, 0], square[:, 1] @ square[:, 1]])
    v = (torch.exp(2 * sampler.std_prior) * h).clamp(min=1e-3)
    alpha = sampler.expert_weights_prior.exp()
    t = (1 - 2 / 3) / alpha + (1 / alpha).sum() / 9 + 1e-6
    w = torch.softmax(alpha.log() - alpha.log().mean() + t.sqrt() * g, 0)
    a = layer.lora_A["default"].weight + sum(w[n] * 0.5 * noise[n] @ torch.diag(v.sqrt()) for n in range(3)).T
    assert_close(result, layer.base_layer(x) + 3 * x @ a.T @ layer.lora_B["default"].weight.T)
    assert_close(sampler.gaussian_var_prior, torch.diag(v))
    assert_close(sampler.expert_weights, w)


def test_noise_is_for_training_only() -> None:
    model = adapted()
    assert differs(logits(model, features()), logits(model, features()))
    assert_equal(logits(model.eval(), features()), logits(model, features()))
    model.train().merge_adapter()
    assert_close(logits(model, features()), logits(adapted().eval(), features()))


def test_checkpointed_layers_draw_the_same_again() -> None:
    model, x = adapted(), features().requires_grad_()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for a, b in zip(expected, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert_close(a, b)


def test_the_penalty() -> None:
    model = adapted(kl_loss_weight=0.1, use_entropy=True, dirichlet_prior=0.3)
    model(features())
    expected = []
    for name, module in model.named_modules():
        if not isinstance(module, MontecloraSampler):
            continue
        assert "lora_monteclora_sampler.default" in name
        p, q = module.std_prior, module.expert_weights_prior
        alpha, prior = q.exp(), torch.full_like(q, 0.3)
        first = torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
        first = first + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        first = first + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        second = (torch.exp(2 * p).sum() - (2 * p).sum() - 2) * 2 / 2
        v = module.gaussian_var_prior.diagonal()
        third = (v.sum() - v.log().sum() - 2) * 3 / 2
        expected.append(0.1 * (first + second + third) + module.expert_weights.square().sum())
    assert len(expected) == 4
    penalty = model.base_model._get_monteclora_loss()
    assert_close(penalty, sum(expected) / 4)
    penalty.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "prior" in name)
    assert model.eval().base_model._get_monteclora_loss() == 0.0
    assert get_peft_model(stack(), LoraConfig(target_modules=["up"])).base_model._get_monteclora_loss() == 0.0


def test_a_new_sampler() -> None:
    torch.manual_seed(0)
    sampler = MontecloraSampler(6, 2, 4)
    assert_equal(sampler.gaussian_var_prior, torch.eye(2))
    assert_equal(sampler.expert_weights, torch.full((4,), 0.25))
    for prior in (sampler.std_prior, sampler.expert_weights_prior):
        assert prior.min() >= 0 and prior.max() <= 1 and prior.requires_grad
    drawn = BufferedMontecloraSampler(sampler, 3).get()
    assert drawn.normal.shape == (4,) and (drawn.wishart > 0).all()


def test_copies_after_a_training_step() -> None:
    model = adapted()
    model(features()).sum().backward()
    other = copy.deepcopy(model)
    assert_equal(logits(other.eval(), features()), logits(model.eval(), features()))


def test_low_precision() -> None:
    settings = MontecloraConfig(num_samples=3)
    config = LoraConfig(r=2, target_modules=["up"], monteclora_config=settings)
    model = get_peft_model(stack().bfloat16(), config, autocast_adapter_dtype=False).train()
    loss = model(features().bfloat16()).square().sum() + model.base_model._get_monteclora_loss()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_without_the_sampler(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "sampler" not in key}, path)
    with pytest.warns(UserWarning, match="lacks"):
        again = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(logits(again.eval(), features()), logits(model, features()))
    assert_equal(
        again.base_model.model.head.lora_monteclora_sampler["default"].expert_weights, torch.full((3,), 1 / 3)
    )
    again.train()(features())


def test_numbers_that_are_none_are_left_out() -> None:
    model = adapted()
    head = model.base_model.model.head
    expected = logits(model.eval(), features())
    for module in model.train().modules():
        if isinstance(module, MontecloraSampler):
            module.sample_scaler = 0.0
    assert_close(logits(model, features()), expected)
    with torch.no_grad():
        head.lora_monteclora_sampler["default"].std_prior.fill_(float("nan"))
    with warned("training has diverged"):
        assert_close(logits(model, features()), expected)


class PlainTrainer:
    """What the mixin asks of a trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items=1):
        outputs = model(inputs)
        loss = outputs.square().sum() / num_items
        return (loss, outputs) if return_outputs else loss


class MonteTrainer(MontecloraTrainerMixin, PlainTrainer):
    """A trainer with it."""


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_mixin(wrapped: bool) -> None:
    model = adapted(kl_loss_weight=0.1)
    whole = nn.Sequential(model) if wrapped else model
    loss, outputs = MonteTrainer().compute_loss(whole, features(), return_outputs=True, num_items=2)
    penalty = model.base_model._get_monteclora_loss()
    assert penalty != 0
    assert_close(loss, outputs.square().sum() / 2 + penalty)
    torch.manual_seed(0)
    loss = MonteTrainer().compute_loss(whole, features())
    torch.manual_seed(0)
    assert_close(loss, model(features()).square().sum() + model.base_model._get_monteclora_loss())
    assert_close(MonteTrainer().compute_loss(stack(), features()), stack()(features()).square().sum())


def test_it_is_not_converted_when_it_is_saved(tmp_path: Path) -> None:
    settings = MontecloraConfig(num_samples=3)
    config = LoraConfig(r=2, target_modules=["up"], monteclora_config=settings, init_lora_weights="pissa")
    model = get_peft_model(stack(), config)
    model.save_pretrained(tmp_path / "start")
    with refused(model, ValueError, "doubles ranks"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")


@pytest.mark.parametrize("changes", [{"num_samples": 0}, {"dirichlet_prior": 0.0}, {"buffer_size": 0}])
def test_configs_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be positive"):
        MontecloraConfig(**changes)
