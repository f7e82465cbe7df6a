# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is trained: it is what was asked for, whatever is loaded, switched off or deleted meanwhile."""

from pathlib import Path

import pytest
from support.helpers import randomise, trainable
from test_all_or_nothing import LAYERED, PROMPTS, adapted, first, is_prompt, prompt, second
from test_all_or_nothing import base as base_for

from peft import LoraConfig, PeftModel, get_peft_model


pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = [*LAYERED, *PROMPTS]
# biases exist once, a start that changes the base comes first, and AdaLoRA trains one adapter
ALONE = ("LORA-bias", "LORA-pissa")


def two(method: str) -> PeftModel:
    model = adapted(method)
    model.add_adapter("b", prompt(method) if is_prompt(method) else second(method))
    randomise(model, r"\.b\b|\.b\.")
    return model


def of(names: set[str], adapter: str) -> set[str]:
    return {name for name in names if adapter in name.split(".")}


# ------------------------------------------------------------------------------------------ switching off
@pytest.mark.parametrize("way", ["context", "layers"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay_frozen_when_adapters_were_off(method: str, way: str) -> None:
    model = adapted(method)
    asked_for = sorted(trainable(model))
    parameters = dict(model.named_parameters())
    for name in asked_for[::2]:
        parameters[name].requires_grad_(False)
    before = trainable(model)
    if way == "context":
        with model.disable_adapter():
            off = trainable(model)
    elif is_prompt(method):
        return
    else:
        model.base_model.disable_adapter_layers()
        off = trainable(model)
        model.base_model.disable_adapter_layers()  # once more changes nothing
        model.base_model.enable_adapter_layers()
    assert of(off, "a") == set()
    assert trainable(model) == before
    if not is_prompt(method):
        model.base_model.enable_adapter_layers()  # they are on already
        assert trainable(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_is_asked_for_while_adapters_are_off_counts(method: str) -> None:
    model = adapted(method)

    def ask(trained: bool) -> None:
        if is_prompt(method):  # the prompt that is put to use is the one that is trained
            model.set_adapter("a", inference_mode=not trained)
        else:
            model.set_requires_grad("a", trained)

    with model.disable_adapter():
        ask(False)
    assert of(trainable(model), "a") == set()
    with model.disable_adapter():
        ask(True)
    assert of(trainable(model), "a")


# ------------------------------------------------------------------------------------------ deleting
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ALONE])
def test_deleting_another_adapter_changes_no_flag(method: str) -> None:
    model = two(method)
    parameters = dict(model.named_parameters())
    for name in sorted(trainable(model))[::2]:
        parameters[name].requires_grad_(False)
    before = of(trainable(model), "a")
    model.delete_adapter("b")
    assert of(trainable(model), "a") == before


def test_deleting_one_of_several_active_adapters_changes_no_flag() -> None:
    plain = LoraConfig(r=2, target_modules=["body"])
    model = get_peft_model(base_for("LORA"), plain, "a")
    model.add_adapter("b", plain)
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", False)
    model.delete_adapter("b")
    assert model.active_adapter == "a" and trainable(model) == set()


@pytest.mark.parametrize("trained", [True, False])
def test_an_adapter_that_becomes_active_is_trained_if_the_other_was(trained: bool) -> None:
    plain = LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm"])
    model = get_peft_model(base_for("LORA"), plain, "a")
    model.add_adapter("b", plain)
    model.set_requires_grad("a", trained)
    model.delete_adapter("a")
    assert model.active_adapter == "b" and bool(trainable(model)) == trained


def test_an_adapter_for_inference_that_becomes_active_stays_frozen(tmp_path: Path) -> None:
    plain = LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm"])
    model = get_peft_model(base_for("LORA"), plain)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b")
    model.delete_adapter("default")
    assert model.active_adapter == "b" and trainable(model) == set()


# ------------------------------------------------------------------------------------------ loading and adding
@pytest.mark.parametrize("method", [method for method in LAYERED if method not in (*ALONE, "ADALORA")])
def test_what_is_loaded_to_be_trained_is_trained(method: str, tmp_path: Path) -> None:
    get_peft_model(base_for(method), first(method)).save_pretrained(tmp_path)
    model = adapted(method)
    active = trainable(model)
    model.load_adapter(tmp_path, "frozen")
    assert trainable(model) == active
    model.load_adapter(tmp_path, "b", is_trainable=True)
    assert model.active_adapters == ["a"]
    assert trainable(model) == active | {
        ".".join("b" if part == "a" else part for part in name.split(".")) for name in active
    }
    everything = trainable(model)
    model.add_adapter("c", second(method))
    assert trainable(model) == everything
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == everything


def test_tokens_that_the_first_adapter_does_not_train() -> None:
    model = get_peft_model(base_for("LORA"), LoraConfig(target_modules=["body"]))
    model.add_adapter("other", LoraConfig(target_modules=["body"], trainable_token_indices={"emb": [0]}))
    wrapper = model.get_base_model().emb
    rows = wrapper.token_adapter.trainable_tokens_delta["other"]
    for name, active in ((None, []), ("other", ["other"]), ("default", [])):
        if name is not None:
            model.set_adapter(name)
        assert wrapper.active_adapters == active and rows.requires_grad == bool(active)
        assert wrapper.active_adapter == (active[0] if active else [])
    assert model.get_model_status().active_adapters == ["default"]
