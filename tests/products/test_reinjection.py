# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""An adapter that is injected under the name of an earlier one: nothing of that one is left."""

from typing import Any

import pytest
import torch
from support.helpers import assert_close, logits, randomise, warned
from support.method_options import is_mergeable
from test_all_or_nothing import INJECTABLE, config, merged, net
from torch import nn

from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.anatomy.walking import adapter_modules, base_parameters
from peft.config import PeftConfig
from peft.layers.merging.model import merge_layers


pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 3, 5, 2], [4, 4, 0, 7]])


def new_config(method: str) -> PeftConfig:
    """A config of the same method, without variant, that reaches less."""
    name = method.partition("-")[0]
    changes: dict[str, Any] = {} if name == "TRAINABLE_TOKENS" else {"modules_to_save": None}
    if name == "TRAINABLE_TOKENS":
        changes["token_indices"] = [1, 9]
    return config(name, **changes)


def settings(model: nn.Module) -> dict[str, Any]:
    """What layers note about their adapters, and of what class they are."""
    found: dict[str, Any] = {}
    for name, module in adapter_modules(model):
        noted = {key: getattr(module, key, None) for key in module.other_param_names}
        tables = {key: sorted(value.keys()) for key, value in noted.items() if hasattr(value, "keys")}
        numbers = {
            key: dict(value)
            for key, value in noted.items()
            if isinstance(value, dict) and all(isinstance(v, (int, float, list)) for v in value.values())
        }
        variants = {key: type(value) for key, value in getattr(module, "variants", {}).items()}
        found[name] = (type(module), tables, numbers, variants, sorted(module.available_adapters))
        found[name] += (module.active_adapters, sorted(getattr(module, "_owners", ())))
    return found


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("method", INJECTABLE)
def test_nothing_of_the_old_adapter_is_left(method: str, is_merged: bool) -> None:
    model = merged(method)
    if not is_merged:
        for module in model.modules():
            if getattr(module, "merged", False):
                module.unmerge()
    asked = new_config(method)
    inject_adapter_in_model(asked, model, "a")
    fresh = inject_adapter_in_model(asked, net(), "a")
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert settings(model) == settings(fresh)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 0
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }
    randomise(fresh, r"(?<!ranknum)\.a\b")
    set_peft_model_state_dict(model, get_peft_model_state_dict(fresh, adapter_name="a"), adapter_name="a")
    if method == "LORA-pissa":  # has changed the base weights for good
        return
    assert_close(logits(model.eval(), IDS), logits(fresh.eval(), IDS))
    if is_mergeable(method):
        merge_layers(model)
    for _, module in adapter_modules(model):
        if getattr(module, "merged", False):
            module.unmerge()
    for (name, now), (_, expected) in zip(
        base_parameters(model), net().named_parameters(remove_duplicate=False), strict=True
    ):
        assert torch.allclose(now, expected, atol=1e-6), name


def test_the_strategy_of_the_old_adapter_is_gone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapter_in_model(LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False), model, "a")
    with warned("a is replaced"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), model, "a")
    assert model[0].variants == {} and not model[0].use_dora["a"]
    x = torch.ones(1, 8)
    assert_close(model(x), model[0].base_layer(x) + x @ model[0].get_delta_weight("a").T)


def test_other_adapters_stay() -> None:
    model = net()
    plain = LoraConfig(target_modules=["body"], init_lora_weights=False)
    for name in ("a", "b"):
        inject_adapter_in_model(plain, model, name)
    with_b = logits(model, IDS)
    inject_adapter_in_model(LoraConfig(target_modules=["emb"], init_lora_weights=False), model, "a")
    assert model.body.available_adapters == {"b"} and model.emb.available_adapters == {"a"}
    for layer in (model.body, model.emb):
        layer.set_adapter("b")
    assert_close(logits(model, IDS), with_b)


def test_a_module_may_be_reached_in_another_way_the_second_time() -> None:
    """Adapted first, trained in full then, and the other way round."""
    ways = [LoraConfig(target_modules=["head", "body"]), LoraConfig(target_modules=["body"], modules_to_save=["head"])]
    for first, second in (ways, reversed(ways)):
        model = net()
        inject_adapter_in_model(first, model)
        inject_adapter_in_model(second, model)
        assert list(model.state_dict()) == list(inject_adapter_in_model(second, net()).state_dict())


def test_wrapping_the_base_model_again_replaces_the_adapter() -> None:
    base = net()
    get_peft_model(base, LoraConfig(target_modules=["body"], r=3))
    model = get_peft_model(base, LoraConfig(target_modules=["body"], r=5))
    assert model.get_base_model().body.r == {"default": 5} and list(model.peft_config) == ["default"]
