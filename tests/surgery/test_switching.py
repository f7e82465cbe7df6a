# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""An adapter that comes after the last one was deleted is active, however it comes."""

import pytest
import torch
from support.helpers import differs, linears, randomise, trainable
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftConfig, PeftMixedModel, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from peft.utils import _freeze_adapter, _set_adapter


X = torch.arange(16.0).reshape(2, 8) / 8


def config(*targets: str, **options: object) -> PeftConfig:
    return LoraConfig(r=2, target_modules=list(targets), **options)


def assert_in_use(model: nn.Module, name: str) -> None:
    """Check that an adapter is the active one in all layers, those that lack it too, is trained, and has an effect."""
    layers = [module for module in model.modules() if hasattr(module, "active_adapters") and module is not model]
    assert layers and all(layer.active_adapters == [name] for layer in layers if hasattr(layer, "base_layer"))
    trained = trainable(model)
    assert trained and all(f".{name}" in parameter for parameter in trained)
    before = model(X)
    randomise(model, rf"\.{name}\b")
    assert differs(model(X), before)


@pytest.mark.parametrize("forget", ["delete", "empty", "keep"])
@pytest.mark.parametrize("targets", [["0"], ["0", "2"], ["2"]], ids=str)
def test_injection_after_the_last_adapter_was_deleted(targets: list[str], forget: str) -> None:
    """Callers delete the model's table of configs, or leave it empty."""
    model = linears(8, 8, 8, 8)
    inject_adapter_in_model(config("0", "1", modules_to_save=["2"] if "2" not in targets else None), model, "a")
    delete_adapter(model, "a", "lora_")
    if forget == "delete":
        del model.peft_config
    elif forget == "empty":
        model.peft_config.clear()
    if forget == "keep":
        with pytest.warns(UserWarning, match="holds adapters already"):
            inject_adapter_in_model(config(*targets), model, "b")
    else:
        inject_adapter_in_model(config(*targets), model, "b")
    assert_in_use(model, "b")


def test_injection_for_inference_after_the_last_adapter_was_deleted() -> None:
    model = linears(8, 8)
    inject_adapter_in_model(config("0"), model, "a")
    delete_adapter(model, "a", "lora_")
    del model.peft_config
    inject_adapter_in_model(config("0", inference_mode=True), model, "b")
    assert model[0].active_adapters == ["b"] and trainable(model) == set()


@pytest.mark.parametrize("method", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("mixed", [False, True])
def test_adding_to_a_model_without_adapters(mixed: bool, method: type[PeftConfig]) -> None:
    model = get_peft_model(linears(8, 8, 8), method(r=2, target_modules=["0", "1"]), "a", mixed=mixed)
    model.delete_adapter("a")
    assert model.active_adapters == []
    model.add_adapter("b", method(r=2, target_modules=["0"]))
    assert model.active_adapters == ["b"]
    assert_in_use(model.base_model.model, "b")
    model.add_adapter("c", method(r=2, target_modules=["0"]))
    assert model.active_adapters == ["b"]


def test_no_adapter_is_chosen_and_another_one_added() -> None:
    """That none is active was the caller's choice, and stays so."""
    model = get_peft_model(linears(8, 8), config("0"), "a")
    model.base_model.set_adapter([])
    model.add_adapter("b", config("0"))
    assert model.active_adapters == [] and trainable(model) == set()


def test_what_is_active_is_a_list_in_every_layer() -> None:
    """However an adapter got there, as in the released package."""
    model = linears(8, 8)
    inject_adapter_in_model(config("0"), model)
    layer = model[0]
    assert layer.active_adapter == ["default"]
    for chosen in ("default", ["default"], ("default",)):
        set_adapter(model, chosen)
        assert layer.active_adapter == ["default"]
    made = type(layer)(nn.Linear(8, 8), "default", LoraConfig(), r=2)
    assert made.active_adapter == ["default"]
    assert PeftMixedModel(linears(8, 8), config("0")).active_adapter == ["default"]


def test_wrappers_are_switched_and_adapters_frozen_by_themselves() -> None:
    model = get_peft_model(linears(8, 8, 8), config("0", modules_to_save=["1"]), adapter_name="a")
    model.add_adapter("b", config("0", modules_to_save=["1"]))
    layer, wrapper = model.get_base_model()[0], model.get_base_model()[1]
    _set_adapter(model, "b")
    assert wrapper.active_adapters == ["b"] and layer.active_adapters == ["a"]
    assert wrapper.modules_to_save["b"].weight.requires_grad and not wrapper.modules_to_save["a"].weight.requires_grad
    _set_adapter(model, "a", inference_mode=True)
    assert wrapper.active_adapters == ["a"] and not wrapper.modules_to_save["a"].weight.requires_grad
    assert layer.lora_A["a"].weight.requires_grad
    _freeze_adapter(model, "b")
    assert layer.lora_A["a"].weight.requires_grad
    _freeze_adapter(model, "a")
    assert not trainable(model)
