# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Layers, wrappers and prompts all answer what is asked of a module that was put into a model."""

from collections.abc import Iterator

import pytest
from tests.support.helpers import llama
from torch import nn

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.anatomy.walking import adapter_modules
from peft.layers.adapter_module import AdapterModule
from peft.layers.modules_to_save import ModulesToSaveWrapper
from peft.layers.token_wrapper import TrainableTokensWrapper


CONFIGS = {
    "layers and wrappers": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    ),
    "prompts": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=CONFIGS)
def modules(request: pytest.FixtureRequest) -> list[AdapterModule]:
    model = get_peft_model(llama(), CONFIGS[request.param])
    return [module for _, module in adapter_modules(model)]


def parts(modules: list[AdapterModule]) -> Iterator[AdapterModule]:
    return (module for module in modules if not isinstance(module, TrainableTokensWrapper))


def test_whose_it_is(modules: list[AdapterModule]) -> None:
    for module in modules:
        assert module.available_adapters == {"default"}
        assert module.has_adapter("default") and not module.has_adapter("other")
        assert module.active_adapters == ["default"]
        assert module.source("default") is module
        assert list(module.merged_adapters) == []


def test_what_it_trains(modules: list[AdapterModule]) -> None:
    for module in parts(modules):
        parameters = list(module.adapter_parameters("default"))
        assert parameters and all(isinstance(parameter, nn.Parameter) for parameter in parameters)
        assert list(module.adapter_parameters("other")) == []
        for wanted in (False, True):
            module.set_requires_grad("default", wanted)
            assert {parameter.requires_grad for parameter in parameters} == {wanted}


def test_switching_off_freezes_until_it_is_on_again(modules: list[AdapterModule]) -> None:
    for module in parts(modules):
        parameters = list(module.adapter_parameters("default"))
        for enabled in (False, True):
            module.enable_adapters(enabled)
            assert module.disable_adapters is not enabled
            assert {parameter.requires_grad for parameter in parameters} == {enabled}


def test_what_is_saved(modules: list[AdapterModule]) -> None:
    for module in parts(modules):
        live = {key for _, key in module.adapter_keys("default")}
        assert live and live <= module.state_dict().keys()
        assert list(module.adapter_keys("other")) == []
        for nothing in (module.shared_keys, module.adapter_aliases, module.saved_forms):
            assert list(nothing("default")) == []


def test_what_is_gone_is_gone(modules: list[AdapterModule]) -> None:
    for module in parts(modules):
        if module._base_names:  # prompts are deleted as a model's adapters are
            module.remove_adapter("default")
            assert not module.has_adapter("default")
            assert list(module.adapter_parameters("default")) == []


def test_a_wrapper_keeps_the_parts_of_others_when_one_is_removed() -> None:
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "one")
    wrapper.update("two")
    wrapper.remove_adapter("one")
    assert wrapper.available_adapters == {"two"}
