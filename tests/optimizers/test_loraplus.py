# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA+: which parameter has which learning rate."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tied_models import llama
from torch import nn

from peft import IA3Config, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils.error import PeftTypeError, PeftValueError
from peft.utils.warning import PeftWarning


LR, RATIO = 1e-3, 16


def net() -> nn.Module:
    """An embedding, a linear layer, a norm and a head."""
    parts = {"embed": nn.Embedding(7, 6), "linear": nn.Linear(6, 5), "norm": nn.LayerNorm(5), "head": nn.Linear(5, 3)}
    return nn.Sequential(nn.ModuleDict(parts))


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Name the parameters of each group, without what stands before the adapter's own part."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)].split("0.", 1)[1] for p in group["params"]] for group in optimizer.param_groups]


def loraplus(model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **kwargs)


def test_groups() -> None:
    config = LoraConfig(
        r=2, target_modules=["embed", "linear"], modules_to_save=["norm", "head"], lora_bias=False, use_dora=True
    )
    model = get_peft_model(net(), config)
    optimizer = loraplus(model, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-5, betas=(0.8, 0.9))
    assert names_by_group(model, optimizer) == [
        ["linear.lora_A.default.weight", "head.modules_to_save.default.weight"],
        ["embed.lora_embedding_A.default", "embed.lora_embedding_B.default"],
        [
            "embed.lora_magnitude_vector.default.weight",
            "linear.lora_B.default.weight",
            "linear.lora_magnitude_vector.default.weight",
        ],
        [],
        [
            "norm.modules_to_save.default.weight",
            "norm.modules_to_save.default.bias",
            "head.modules_to_save.default.bias",
        ],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 3e-5, LR * RATIO, LR * RATIO, LR]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_bias_of_factor_b_does_not_decay() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"], lora_bias=True))
    groups = names_by_group(model, loraplus(model))
    assert groups[2:] == [["linear.lora_B.default.weight"], ["linear.lora_B.default.bias"]]


def test_only_the_active_of_several_adapters() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["linear"]))
    model.set_adapter("other")
    groups = names_by_group(model, loraplus(model))
    assert groups == [["linear.lora_A.other.weight"], [], ["linear.lora_B.other.weight"], []]


def test_a_step() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    layer = model.get_base_model()[0]["linear"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = a.detach().clone(), b.detach().clone()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(a, before[0] - LR * a.grad)
    torch.testing.assert_close(b, before[1] - LR * RATIO * b.grad)


def test_tied_factors_are_there_once() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "layers.0.self_attn.q_proj"])
    config.ensure_weight_tying = True
    model = get_peft_model(llama(), config)
    assert [len(group["params"]) for group in loraplus(model).param_groups] == [1, 2, 1, 0]


def test_two_objects_of_one_tensor_are_there_once() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"], modules_to_save=["head"]))
    head = model.get_base_model()[0]["head"].modules_to_save["default"]
    model.again = nn.Module()
    model.again.weight = nn.Parameter(head.weight.detach())
    assert sum(p is head.weight or p is model.again.weight for p in loraplus(model).param_groups[0]["params"]) == 1


def test_functions_that_make_optimisers() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"]))
    made = create_loraplus_optimizer(
        model, lambda groups, lr: SimpleNamespace(groups=groups, lr=lr), lr=LR, loraplus_lr_ratio=2
    )
    assert made.lr == LR and len(made.groups) == 4


def test_embeddings_keep_precise_states_in_8_bits() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    manager = optim.GlobalOptimManager.get_instance()
    held = list(manager.module_weight_config_triple)
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"], modules_to_save=["embed"]))
    try:
        create_loraplus_optimizer(model, optim.AdamW8bit, lr=LR, loraplus_lr_ratio=RATIO)
        added = manager.module_weight_config_triple[len(held) :]
    finally:
        manager.module_weight_config_triple[:] = held
    trained = model.get_base_model()[0]["embed"].modules_to_save["default"]
    assert added == [(trained, "weight", {"optim_bits": 32})]


def test_refusals() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["linear"]))
    for wrong in ({"lr": -1.0}, {"lr": "fast"}, {"loraplus_lr_ratio": None}, {"loraplus_weight_decay": -0.1}):
        with pytest.raises(PeftValueError, match=f"{next(iter(wrong))} must be a number"):
            create_loraplus_optimizer(model, torch.optim.SGD, **{"lr": LR, "loraplus_lr_ratio": RATIO, **wrong})
    with pytest.raises(PeftTypeError, match="optimizer_cls"):
        create_loraplus_optimizer(model, "adamw", lr=LR, loraplus_lr_ratio=RATIO)
    with pytest.raises(PeftValueError, match="nothing to optimise"):
        loraplus(model.requires_grad_(False))


def test_ratio_without_factors_warns() -> None:
    model = get_peft_model(net(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    with pytest.warns(PeftWarning, match="no factor B"):
        loraplus(model)
