# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Riemannian preconditioning: steps against the formulas, written once more by hand."""

from typing import Any

import pytest
import torch
from support.tied_models import llama
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from peft.utils.error import PeftRuntimeError, PeftTypeError, PeftValueError


LR, REG = 1e-2, 0.3
RANKS = {"target_modules": ["0", "2"], "modules_to_save": None, "rank_pattern": {"2": 3}}
X = torch.linspace(-1, 1, 24).view(3, 8)


def adapted(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    options = {"target_modules": ["0"], "modules_to_save": ["2"], "r": 2, "init_lora_weights": False}
    return get_peft_model(net, LoraConfig(**{**options, **kwargs}))


def expected_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Precondition pairs by hand, and leave the rest."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
    for name in named:
        other = name.replace("lora_A", "lora_B")
        if other == name or "embedding" in name:
            continue
        a, b = named[name].detach().double(), named[other].detach().double()
        for key, gram in ((name, b.T @ b), (other, a @ a.T)):
            inverse = torch.linalg.inv(gram + REG * torch.eye(len(a)))
            left, right = (inverse, gradients[key].double()) if key == name else (gradients[key].double(), inverse)
            gradients[key] = (left @ right).float()
    return gradients


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, RANKS], ids=str)
def test_a_step_of_sgd(options: dict[str, Any]) -> None:
    model = adapted(**options)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=LR, reg=REG)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        gradients = expected_gradients(model)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        usual = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, parameter in model.named_parameters():
            moved = before[name] - LR * gradients[name] if name in gradients else before[name]
            torch.testing.assert_close(parameter.detach(), moved, rtol=1e-5, atol=1e-6)
            if name in usual:
                assert parameter.grad is usual[name][0] and torch.equal(*usual[name]), f"{name}: its gradient changed"


def test_only_the_active_of_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=3))
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not any("other" in names[id(parameter)] for parameter in optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_embeddings_and_tied_factors_keep_their_gradients() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    config.ensure_weight_tying = True
    model = get_peft_model(llama(), config)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=LR, reg=REG)
    parameters = optimizer.param_groups[0]["params"]
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    gradients = expected_gradients(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            model.get_parameter(name).detach(), before[name] - LR * gradient, rtol=1e-4, atol=1e-5
        )


def test_experts_are_preconditioned_one_by_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("eoi,bi->ebo", self.weight, x)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(Experts()), config)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=LR, reg=REG)
    a, b = optimizer.param_groups[0]["params"]
    model(X[:, :4]).square().sum().backward()
    before, gradients = (a.detach().clone(), b.detach().clone()), (a.grad.clone(), b.grad.clone())
    optimizer.step()
    for expert in range(3):
        rows = slice(2 * expert, 2 * expert + 2)
        gram = before[0][rows] @ before[0][rows].T + REG * torch.eye(2)
        moved = before[1][:, expert::3] - LR * gradients[1][:, expert::3] @ torch.linalg.inv(gram)
        torch.testing.assert_close(b.detach()[:, expert::3], moved, rtol=1e-4, atol=1e-5)
        gram = before[1][:, expert::3].T @ before[1][:, expert::3] + REG * torch.eye(2)
        moved = before[0][rows] - LR * torch.linalg.inv(gram) @ gradients[0][rows]
        torch.testing.assert_close(a.detach()[rows], moved, rtol=1e-4, atol=1e-5)


def test_subclasses_that_call_their_parents_step_precondition_once() -> None:
    torch.optim.SGD([nn.Parameter(X.clone())])  # from now on, its steps call hooks too

    class Slower(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    models = [adapted() for _ in range(2)]
    for model, optimizer_cls in zip(models, (torch.optim.SGD, Slower), strict=True):
        optimizer = create_riemannian_optimizer(model, optimizer_cls, lr=LR, reg=REG)
        assert isinstance(optimizer, optimizer_cls)
        model(X).square().sum().backward()
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_starts_where_b_is_zero_without_regularisation() -> None:
    model = adapted(init_lora_weights=True)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=LR, reg=0.0)
    model(X).square().sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_refusals() -> None:
    model = adapted()
    for wrong in ({"lr": -1.0}, {"reg": -1.0}, {"reg": None}):
        with pytest.raises(PeftValueError, match="must be a number"):
            create_riemannian_optimizer(model, torch.optim.SGD, **{"lr": LR, **wrong})
    with pytest.raises(PeftTypeError, match="optimizer_cls"):
        create_riemannian_optimizer(model, lambda groups, lr: None, lr=LR)
    with pytest.raises(PeftValueError, match="closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=LR)
    with pytest.raises(PeftValueError, match="no pair"):
        create_riemannian_optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=LR)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=LR)
    for arguments in ({"closure": lambda: 0.0}, (lambda: 0.0,)):
        with pytest.raises(PeftValueError, match="closure"):
            optimizer.step(**arguments) if isinstance(arguments, dict) else optimizer.step(*arguments)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:1]
    with pytest.raises(PeftRuntimeError, match="1 tensors in the place of the 4"):
        optimizer.step()
