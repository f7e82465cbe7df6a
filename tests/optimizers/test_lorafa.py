# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA-FA: steps against the formulas, written once more by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from support.tied_models import llama
from torch import nn

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.utils.error import PeftRuntimeError, PeftValueError
from peft.utils.warning import PeftWarning


LR, DECAY, STEPS = 1e-2, 0.1, 3


class Net(nn.Module):
    """A layer of each kind that factors look different on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 5, 4))
        self.head = nn.Linear(5, 2)
        self.experts.forward = lambda x: torch.einsum("eoi,bsi->bso", self.experts.weight, x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        hidden = self.conv(self.linear(self.embed(ids)).mT).mT
        return self.head(self.experts(hidden)).square()


IDS = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])


def adapted(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"target_modules": ["linear"], "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    return get_peft_model(Net(), LoraConfig(**{**options, **kwargs}))


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IDS).sum().backward()


def adam(value: torch.Tensor, gradients: list[torch.Tensor], lr: float = LR, decay: float = 0.0) -> torch.Tensor:
    """Make steps of Adam, an entry at a time as the paper writes them."""
    value, mean, square = value.double(), 0, 0
    for n, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.999 * square + 0.001 * gradient.double() ** 2
        step = math.sqrt(1 - 0.999**n) / (1 - 0.9**n) * mean / (square.sqrt() + 1e-6)
        value = value - lr * step
        value = value - lr * decay * value
    return value.float()


def check_steps(model: nn.Module, optimizer: LoraFAOptimizer, projections: dict[str, Any], decay: float = 0.0) -> None:
    """Make steps, and compare every parameter with what `projections` make of the gradients of those they name."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    seen: dict[str, list[torch.Tensor]] = {}
    for _ in range(STEPS):
        backward(model, optimizer)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                project = next((rule for part, rule in projections.items() if part in name), lambda gradient: gradient)
                seen.setdefault(name, []).append(project(parameter.grad.clone()))
        optimizer.step()
    assert seen
    for name, parameter in model.named_parameters():
        expected = adam(start[name], seen[name], decay=decay) if name in seen else start[name]
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def by_inverse(a: torch.Tensor, scaling: float) -> Any:
    """Make the projection of a plain pair."""
    inverse = torch.linalg.inv(a.detach().double() @ a.detach().double().T) / scaling**2
    return lambda gradient: (gradient.double() @ inverse).float()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_steps(options: dict[str, Any]) -> None:
    model = adapted(modules_to_save=["head"], **options)
    a = model.get_base_model().linear.lora_A["default"].weight
    scaling = 3 / math.sqrt(2) if "use_rslora" in options else 3 / 2
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR, weight_decay=DECAY)
    assert not a.requires_grad
    check_steps(model, optimizer, {"lora_B.default.weight": by_inverse(a, scaling)}, DECAY)


def test_only_what_is_trained_and_factors_are_listed() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    names = optimizer.param_groups[0]["names"]
    assert [name.rsplit(".", 3)[-3] for name in names] == ["lora_A", "lora_B"]
    assert optimizer.param_groups[0]["scaling_factors"] == [None, 1.5]


def test_embedding() -> None:
    model = adapted(target_modules=["embed"])
    a = model.get_base_model().embed.lora_embedding_A["default"]
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    assert not a.requires_grad
    check_steps(model, optimizer, {"lora_embedding_B": by_inverse(a, 1.5)})


def test_groups_of_a_convolution() -> None:
    with pytest.warns(PeftWarning, match="groups"):
        model = adapted(target_modules=["conv"])
    a = model.get_base_model().conv.lora_A["default"].weight
    assert a.shape == (2, 6, 3)

    def project(gradient: torch.Tensor) -> torch.Tensor:
        parts = zip(gradient.chunk(2), a.chunk(2), strict=True)
        return torch.cat([by_inverse(rows.flatten(1), 1.5)(part.flatten(1)).view(part.shape) for part, rows in parts])

    check_steps(model, create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR), {"lora_B": project})


def test_experts() -> None:
    model = adapted(target_modules=[], target_parameters=["experts.weight"])
    a = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    assert a.shape == (6, 4)

    def project(gradient: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(gradient)
        for expert in range(3):
            # those of an expert stand together in A, and take turns in B
            inverse = by_inverse(a[expert * 2 : expert * 2 + 2], 1.5)
            result[:, expert::3] = inverse(gradient[:, expert::3])
        return result

    check_steps(model, create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR), {"lora_B": project})


def test_the_step_is_that_of_the_weight_on_rows_of_a() -> None:
    """Without Adam, W moves by its own gradient, projected onto what A can reach: what the paper asks for."""
    model = adapted()
    layer = model.get_base_model().linear
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    layer.base_layer.weight.requires_grad_(True)
    backward(model, optimizer)
    ((b, gradient),) = optimizer._gradients(optimizer.param_groups[0])
    a = layer.lora_A["default"].weight
    onto_rows = torch.linalg.pinv(a) @ a
    torch.testing.assert_close(1.5 * gradient @ a, layer.base_layer.weight.grad @ onto_rows, rtol=1e-4, atol=1e-4)


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["linear"], r=3, lora_alpha=6, init_lora_weights=False))
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    layer = model.get_base_model().linear
    factors = {name: layer.lora_A[name].weight for name in ("default", "other")}
    check_steps(model, optimizer, {"lora_B.default": by_inverse(factors["default"], 1.5)})
    model.set_adapter("other")
    factors["other"].requires_grad_(False)
    check_steps(model, optimizer, {"lora_B.other": by_inverse(factors["other"], 2.0)})


def test_factor_a_is_never_moved() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    model.set_adapter("default")  # makes A trainable again
    a = model.get_base_model().linear.lora_A["default"].weight
    before = a.detach().clone()
    backward(model, optimizer)
    assert a.grad is not None
    optimizer.step()
    assert torch.equal(a, before)


def test_another_a_has_another_inverse() -> None:
    model = adapted()
    a = model.get_base_model().linear.lora_A["default"].weight
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    backward(model, optimizer)
    optimizer.step()
    with torch.no_grad():
        a.mul_(3)
    backward(model, optimizer)
    ((b, gradient),) = optimizer._gradients(optimizer.param_groups[0])
    torch.testing.assert_close(gradient, by_inverse(a, 1.5)(b.grad), rtol=1e-4, atol=1e-5)


def test_tied_factors_make_one_step() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    config.ensure_weight_tying = True
    model = get_peft_model(llama(), config)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=LR)
    a, b = optimizer.param_groups[0]["params"]
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    gradient = by_inverse(a, config.lora_alpha / 2)(b.grad)
    expected = adam(b.detach(), [gradient])
    optimizer.step()
    torch.testing.assert_close(b.detach(), expected, rtol=1e-4, atol=1e-5)


def test_goes_on_from_its_state() -> None:
    models = [adapted(lora_bias=True) for _ in range(2)]
    first, second = (create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR) for model in models)
    for _ in range(4):
        backward(models[0], first)
        first.step()
    for _ in range(2):
        backward(models[1], second)
        second.step()
    state = copy.deepcopy(second.state_dict())
    torch.save(state, "/dev/null")
    third = create_lorafa_optimizer(models[1], r=2, lora_alpha=3, lr=LR)
    third.load_state_dict(state)
    for _ in range(2):
        backward(models[1], third)
        third.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_low_precision_is_computed_in_float32() -> None:
    model = adapted()
    layer = model.get_base_model().linear
    layer.lora_B["default"].to(torch.bfloat16)
    layer.lora_A["default"].to(torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR)
    b.grad = torch.randn(b.shape).bfloat16()
    ((_, gradient),) = optimizer._gradients(optimizer.param_groups[0])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, by_inverse(a, 1.5)(b.grad).bfloat16(), rtol=1e-2, atol=0)


def test_groups_without_names_have_steps_of_adam() -> None:
    weight = nn.Parameter(torch.randn(4))
    before, gradient = weight.detach().clone(), torch.randn(4)
    optimizer = LoraFAOptimizer([weight], lr=LR, correct_bias=False)
    weight.grad = gradient
    assert optimizer.step(lambda: 3.0) == 3.0
    expected = before - LR * 0.1 * gradient / ((0.001 * gradient**2).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach(), expected)


def test_rslora_is_deprecated() -> None:
    with pytest.warns(FutureWarning, match="use_rslora"):
        create_lorafa_optimizer(adapted(use_rslora=True), r=2, lora_alpha=3, lr=LR, use_rslora=True)
    model = adapted()
    with pytest.raises(PeftValueError, match="use_rslora"):
        create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=LR, use_rslora=True)
    assert model.get_base_model().linear.lora_A["default"].weight.requires_grad


def test_refusals() -> None:
    for wrong in ({"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": "no"}):
        with pytest.raises(PeftValueError, match="must be a number"):
            LoraFAOptimizer([nn.Parameter(torch.ones(1))], **wrong)
    with pytest.raises(PeftValueError, match="lr must be"):
        create_lorafa_optimizer(adapted(), r=2, lora_alpha=3, lr=-1.0)
    with pytest.raises(PeftValueError, match="lr must be"):
        LoraFAOptimizer([{"params": nn.Parameter(torch.ones(1)), "lr": -1.0}])
    with pytest.raises(PeftValueError, match="names has 2 entries for 1"):
        LoraFAOptimizer([{"params": [nn.Parameter(torch.ones(1))], "names": ["a", "b"]}])
    with pytest.raises(PeftValueError, match="no factors of LoRA"):
        create_lorafa_optimizer(Net(), r=2, lora_alpha=3, lr=LR)
    adalora = get_peft_model(Net(), AdaLoraConfig(target_modules=["linear"], total_step=10))
    with pytest.raises(PeftValueError, match="no factors of LoRA"):
        create_lorafa_optimizer(adalora, r=2, lora_alpha=3, lr=LR)
    with pytest.raises(PeftValueError, match="scaling 0"):
        create_lorafa_optimizer(adapted(lora_alpha=0), r=2, lora_alpha=0, lr=LR)


def test_refuses_sparse_gradients_and_pieces_of_factors() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(PeftRuntimeError, match="sparse"):
        LoraFAOptimizer([weight]).step()
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    b.grad = torch.ones(4)
    with pytest.raises(PeftRuntimeError, match="flat pieces"):
        LoraFAOptimizer([{"params": [a, b], "names": ["x.lora_A.d.weight", "x.lora_B.d.weight"]}]).step()
    optimizer = create_lorafa_optimizer(adapted(), r=2, lora_alpha=3, lr=LR)
    optimizer.param_groups[0]["params"] = [b]
    with pytest.raises(PeftRuntimeError, match="1 tensors in the place of the 2"):
        optimizer.step()
