# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A plan tells what an injection does, and is a value: neither the model nor the plan can be changed by it."""

import copy
import dataclasses

import pytest
from support.tied_models import llama
from torch import nn

from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.anatomy.walking import adapter_modules, is_adapter_layer
from peft.planning import plan_adapter


CONFIGS = {
    "all linear, saved head": LoraConfig(
        target_modules="all-linear", modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
    "adapted head": LoraConfig(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "ranks": LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.q_proj": 3}),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2], ensure_weight_tying=True),
    "parameters": LoraConfig(target_parameters=["q_proj.weight"], target_modules=["v_proj"]),
    "LoHa": LoHaConfig(target_modules=["k_proj", "embed_tokens"], ensure_weight_tying=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(target_modules=["q_proj"], r=2),
    "LN tuning": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_tells_the_layers_that_come(name):
    config = CONFIGS[name]
    model = llama()
    modules = dict(model.named_modules())
    plan = plan_adapter(model, config)
    assert dict(model.named_modules()) == modules
    assert not hasattr(model, "peft_config")
    adapted = get_peft_model(model, copy.copy(config))
    layers = {}
    for full, layer in adapter_modules(model):
        if is_adapter_layer(layer) and not full.endswith(".token_adapter"):
            parameter = getattr(layer, "parameter_name", None)
            layers[full if parameter is None else f"{full}.{parameter}"] = layer
    assert {target.name for target in plan.targets} == set(layers)
    for target in plan.targets:
        layer = layers[target.name]
        assert type(layer) is target.layer_class
        assert target.kind == type(layer.get_base_layer()).__name__
        if target.owner is not None:
            assert layer.source("default") is layers[target.owner]
        elif "r" in target.arguments:
            assert layer.r["default"] == target.arguments["r"]
    assert list(plan.module_names) == adapted.targeted_module_names
    assert list(plan.parameters) == adapted.targeted_parameter_names
    config = adapted.peft_config["default"]
    assert plan.ties.get("modules_to_save", {}) == (config.modules_to_tie or {})
    assert plan.ties.get("target_modules", {}) == (config.target_modules_to_tie or {})
    assert plan.ties.get("trainable_token_indices", {}) == (config.token_modules_to_tie or {})


def test_a_plan_cannot_be_changed():
    plan = plan_adapter(llama(), CONFIGS["adapted head"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.targets = ()
    with pytest.raises(TypeError):
        plan.targets[0].arguments["r"] = 1
    with pytest.raises(TypeError):
        plan.ties["target_modules"]["lm_head"] = "other"


def test_what_it_tells_beside_the_layers():
    config = LoraConfig(
        target_modules=["q_proj", "v_porj"],
        exclude_modules=["layers.1.self_attn.q_proj"],
        modules_to_save=["norm"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    with pytest.warns(match="v_porj"):
        plan = plan_adapter(llama(), config)
    assert plan.matched == ("model.layers.0.self_attn.q_proj",)
    assert plan.excluded == ("model.layers.1.self_attn.q_proj",)
    assert "v_proj" in plan.near_misses["v_porj"]
    assert "model.norm" in plan.additional.saved
    assert plan.additional.tokens == {"model.embed_tokens": (3, 5)}


def test_printed_it_is_a_summary():
    text = str(plan_adapter(llama(), CONFIGS["all linear, saved head"]))
    assert text.startswith("adapter 'default' (LORA): 14 targets")
    assert "2 x model.layers.*.self_attn.q_proj (Linear 16 x 16, r=8, lora_alpha=8)" in text
    assert "lm_head follows model.embed_tokens (modules_to_save)" in text
    net = nn.Sequential(nn.Linear(3, 2))
    assert "  0 (Linear 2 x 3, r=4, lora_alpha=8)" in str(plan_adapter(net, LoraConfig(r=4, target_modules=["0"])))


def test_beside_another_adapter():
    model = get_peft_model(llama(), CONFIGS["adapted head"])
    plan = plan_adapter(model, CONFIGS["ranks"], "other")
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", CONFIGS["ranks"])
    assert list(plan.module_names) == model.base_model.targeted_module_names


def test_what_is_refused():
    with pytest.raises(ValueError, match="no module to adapt"):
        plan_adapter(llama(), LoraConfig(target_modules=["q_porj"]))
    with pytest.raises(ValueError, match="no targets to plan"):
        plan_adapter(llama(), PromptTuningConfig(num_virtual_tokens=2))
