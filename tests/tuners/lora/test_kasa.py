# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""KaSA: what it takes out of the base weight, its formula and its penalty, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, features, logits, randomise, refused, stack
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import KasaConfig, LoraConfig, get_peft_model


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], "kasa_config": KasaConfig(), **changes})


def one_layer(**changes: Any) -> nn.Sequential:
    """A linear layer with an adapter that has an effect."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(net, config(**changes))
    randomise(model)
    return net


def truncated(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The weight less its smallest components, subtracted one by one."""
    u, s, vh = torch.linalg.svd(weight.detach().double())
    rest = weight.detach().double()
    for i in range(len(s) - count, len(s)):
        rest = rest - s[i] * torch.outer(u[:, i], vh[i])
    return rest.float()


def test_the_formula() -> None:
    torch.manual_seed(0)
    weight = nn.Linear(6, 5).weight
    layer, x = one_layer()[0], features(4, 6)
    assert_close(layer.get_base_weight(), truncated(weight, 2))
    a, b, d = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    assert d.shape == (2,) and isinstance(d, nn.Parameter)
    assert_close(layer(x), x @ layer.get_base_weight().T + layer.bias + 3 * ((x @ a.T) * d) @ b.T)
    assert_close(layer.get_delta_weight("default"), 3 * b @ torch.diag(d) @ a)


def test_a_fresh_adapter_adds_nothing_to_the_truncated_weight() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), features(4, 6)
    whole = copy.deepcopy(net[0])
    model = get_peft_model(net, config())
    assert net[0].lora_diag["default"].abs().min() > 0
    assert_close(model(x), nn.functional.linear(x, truncated(whole.weight, 2), whole.bias))


def test_a_second_adapter_takes_out_no_more_than_it_needs() -> None:
    net = one_layer()
    weight = net[0].get_base_weight().clone()
    layer = net[0]
    layer.update_layer("smaller", 1, 1, config=config(r=1))
    assert_equal(layer.get_base_weight(), weight)
    layer.reset_lora_parameters("default", True)
    assert_equal(layer.get_base_weight(), weight)
    layer.update_layer("larger", 3, 1, config=config(r=3))
    assert_close(layer.get_base_weight(), truncated(weight, 3))


def test_the_penalty() -> None:
    settings = KasaConfig(beta=0.5, gamma=0.25)
    torch.manual_seed(0)
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up", "down"], kasa_config=settings))
    randomise(model)
    expected = 0.0
    for name, a in model.named_parameters():
        if "lora_A" in name:
            b = model.get_parameter(name.replace("lora_A", "lora_B"))
            d = model.get_parameter(name.replace("lora_A", "lora_diag").removesuffix(".weight"))
            for gram in (b.T @ b, a @ a.T):
                expected = expected + 0.25 * (gram - torch.eye(2)).pow(2).sum().sqrt()
            expected = expected + 0.5 * d.pow(2).sum()
    penalty = model.base_model._get_kasa_loss()
    assert_close(penalty, expected)
    penalty.backward()
    assert model.base_model._get_kasa_loss([]) == 0.0
    plain = get_peft_model(stack(), LoraConfig(target_modules=["up"]))
    assert plain.base_model._get_kasa_loss() == 0.0


@pytest.mark.parametrize(
    ("layer", "changes", "mention"),
    [
        (nn.Linear(6, 5), {"r": 5}, "use r <= 4"),
        (nn.Linear(6, 5), {"rank_pattern": {"0": 9}}, "takes r=9"),
        (nn.Linear(6, 5), {"init_lora_weights": "pissa"}, "both take something out"),
        (nn.Linear(6, 5), {"init_lora_weights": "olora"}, "both take something out"),
        (Conv1D(5, 6), {"fan_in_fan_out": True}, "nn.Linear only, found Conv1D"),
        (nn.Embedding(6, 5), {}, "nn.Linear only"),
        (nn.Linear(6, 5, device="meta"), {}, "meta device"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), {}, "computed anew"),
    ],
)
def test_targets_that_are_refused(layer: nn.Module, changes: dict[str, Any], mention: str) -> None:
    net = nn.Sequential(layer)
    with refused(net, ValueError, "'0': KaSA", mention):
        get_peft_model(net, config(**changes))


def test_one_target_that_is_refused_leaves_the_others_alone() -> None:
    net = stack()
    with refused(net, ValueError, "'head'"):
        get_peft_model(net, config(r=4, target_modules=["up", "head"]))


@pytest.mark.parametrize("first_is_kasa", [False, True])
def test_other_adapters_are_refused(first_is_kasa: bool) -> None:
    plain = LoraConfig(r=2, target_modules=["up"])
    configs = [config(target_modules=["up"]), plain]
    first, second = configs if first_is_kasa else configs[::-1]
    model = get_peft_model(stack(), first)
    before = logits(model, features())
    with refused(model, ValueError, "takes something out of the base weights"):
        model.add_adapter("other", second)
    assert_equal(logits(model, features()), before)


def test_a_weight_that_others_share_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    with pytest.warns(UserWarning), refused(net, ValueError, "'0', '1' share", "ensure_weight_tying=True"):
        get_peft_model(net, config())


def test_merged_adapters_have_to_be_unmerged_first() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config())
    model.merge_adapter()
    with refused(model, ValueError, "unmerge them first"):
        model.add_adapter("larger", config(r=3))
    model.add_adapter("as_large", config())
    assert model.get_base_model()[0].r == {"default": 2, "as_large": 2}


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_negative_weights_of_the_penalty_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, found -1"):
        KasaConfig(**{name: -1.0})


def test_settings_of_another_type_are_refused() -> None:
    assert config(kasa_config={"beta": 0.5}).kasa_config == KasaConfig(beta=0.5)
    with pytest.raises(TypeError, match="kasa_config must be a KasaConfig"):
        config(kasa_config=3)
