# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Clients that call, extend or replace private parts of the released package: it acts, or they are told what does."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from support.helpers import linears, refused, warned
from torch import nn
from torch.testing import assert_close

from peft import LoraConfig, LoraModel, PeftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.former_methods import STEPS


X = torch.arange(16.0).reshape(2, 8) / 8


def config(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **options})


# ------------------------------------------------------------------------------------------------ calls and extensions
def test_checks_and_preparation_are_extended_with_the_arguments_of_the_release() -> None:
    seen = []

    class Own(LoraModel):
        def _check_new_adapter_config(self, config: LoraConfig) -> None:
            super()._check_new_adapter_config(config)
            seen.append(("check", config.r))

        def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
            super()._prepare_model(peft_config, model)
            seen.append(("prepare", peft_config.r, type(model)))

    net = linears(8, 8, 8)
    tuner = Own(net, config("0"), "default")
    assert seen == [("prepare", 2, nn.Sequential), ("check", 2)]
    tuner._check_new_adapter_config(tuner.peft_config["default"])  # as a client that injects by itself calls it
    tuner.peft_config["b"] = config("1", bias="all")
    tuner.inject_adapter(net, "b")
    tuner.peft_config["c"] = config("1", bias="lora_only")
    with pytest.raises(ValueError, match="'c' trains the base model's biases .* and so does 'b'"):
        tuner._check_new_adapter_config(tuner.peft_config["c"])


@pytest.mark.parametrize("arguments", [(), ("default",), ("default", None, None)], ids=str)
@pytest.mark.parametrize("name", ["_check_new_adapter_config", "_prepare_model", "_create_and_replace"])
def test_other_arguments_are_refused_by_the_name_of_the_call(name: str, arguments: tuple) -> None:
    model = get_peft_model(linears(8, 8, 8), config("0"))
    if (name, len(arguments)) == ("_check_new_adapter_config", 1):
        pytest.skip("that many arguments it has")
    with pytest.raises(TypeError, match=name):
        getattr(model.base_model, name)(*arguments)


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_release_are_not_there_and_it_is_said_what_does_their_work(name: str) -> None:
    model = get_peft_model(linears(8, 8, 8), config("0"))
    assert not hasattr(model.base_model, name)
    with refused(model, AttributeError, f"LoraModel.{name}", STEPS[name]):
        getattr(model.base_model, name)(model)


@pytest.mark.parametrize(
    ("name", "instead"), [("_get_available_adapters", "available_adapters"), ("_cast_input_dtype", "x.to(dtype)")]
)
def test_the_same_of_layers(name: str, instead: str) -> None:
    model = get_peft_model(linears(8, 8, 8), config("0"))
    with refused(model, AttributeError, f"Linear.{name}", instead):
        getattr(model.get_base_model()[0], name)()


def test_what_the_base_model_has_is_its_own() -> None:
    net = linears(8, 8, 8)
    net._replace_module = lambda: "of the model"
    assert get_peft_model(net, config("0")).base_model._replace_module() == "of the model"


def test_steps_that_a_client_brings_and_nobody_calls_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LoraModel):
        def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
            raise AssertionError("not called")

    with warned("Own", "_mark_only_adapters_as_trainable", "never called", "set_requires_grad"):
        Own(linears(8, 8, 8), config("0"), "default")
    monkeypatch.setattr(LoraModel, "_create_new_module", lambda *args, **kwargs: None, raising=False)
    with warned("LoraModel", "_create_new_module", "_create_and_replace"):
        inject_adapter_in_model(config("0"), linears(8, 8, 8))
    original = LoraModel._create_and_replace
    monkeypatch.setattr(LoraModel, "_create_and_replace", lambda self, *a, **k: original(self, *a, **k))
    get_peft_model(linears(8, 8, 8), config("0"))  # the hook may call it: warnings are errors here


@pytest.mark.parametrize(
    "hook", [lambda: None, lambda self, lora_config: None, lambda self, *args, key: None], ids=["none", "two", "key"]
)
def test_a_hook_that_takes_other_arguments_changes_nothing(hook: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraModel, "_create_and_replace", hook)
    net = linears(8, 8, 8)
    before = net[0]
    with pytest.raises(TypeError, match="<lambda>"):
        get_peft_model(net, config("0"))
    assert net[0] is before


# --------------------------------------------------------------------------------------------- merging layer by layer
def merge_if(wanted: str) -> Callable:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.name == wanted:
            for adapter in self.active_adapters:
                self._move_adapter_to_device_of_base_layer(adapter)
            self.merge_origin(safe_merge, adapter_names)

    return merge


def test_merging_asks_what_clients_put_into_layers() -> None:
    """As trainers do that hand weights to an inference engine, a group of parameters at a time."""
    net = linears(8, 8, 8)
    model = get_peft_model(net, config("0", "1"))
    output, before = model(X), [layer.weight.clone() for layer in net]
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.name, module.merge_origin = name.rpartition(".")[2], module.merge
            module.merge = MethodType(merge_if("1"), module)
    model.merge_adapter()
    assert not net[0].merged and net[1].merged
    assert torch.equal(net[0].weight, before[0]) and not torch.equal(net[1].weight, before[1])
    assert_close(model(X), output)

    kept = []
    net[1].unmerge_origin = net[1].unmerge
    net[1].unmerge = lambda: kept.append("asked")
    model.unmerge_adapter()
    assert kept == ["asked"] and net[1].merged
    net[1].unmerge_origin()
    assert_close(net[1].weight, before[1])
    assert_close(model(X), output)


def test_an_adapter_is_moved_to_its_base_layer() -> None:
    net = linears(8, 8)
    model = get_peft_model(net, config("0"))
    layer = net[0]
    layer._move_adapter_to_device_of_base_layer("default")
    layer._move_adapter_to_device_of_base_layer("absent")
    assert layer.lora_A["default"].weight.device == layer.weight.device
    layer._move_adapter_to_device_of_base_layer("default", "cpu")
    assert model(X).shape == (2, 8)
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(8, 8))
    away = get_peft_model(bare, config("0")).get_base_model()[0]
    away._move_adapter_to_device_of_base_layer("default")  # there is nothing to move it to


# ------------------------------------------------------------------------------------------------- configs of clients
@dataclass
class OwnConfig(LoraConfig):
    """A config with a field that only a client knows."""

    extra: int = 3


class BareConfig(LoraConfig):
    """What looks like a field here is none."""

    other: int = 3


def test_fields_of_a_client_are_read_by_its_own_class(tmp_path: Any) -> None:
    OwnConfig(r=2, extra=5).save_pretrained(tmp_path)
    own = OwnConfig.from_pretrained(tmp_path)
    assert type(own) is OwnConfig and own.extra == 5
    assert OwnConfig.from_pretrained(tmp_path, extra=7).extra == 7
    for cls in (LoraConfig, PeftConfig):
        with warned("LoraConfig", "extra"):
            assert type(cls.from_pretrained(tmp_path)) is LoraConfig


def test_a_class_for_another_method_is_not_taken(tmp_path: Any) -> None:
    from peft import AdaLoraConfig

    LoraConfig(r=2).save_pretrained(tmp_path)
    assert type(AdaLoraConfig.from_pretrained(tmp_path)) is LoraConfig


@pytest.mark.parametrize(
    ("make", "mentions"),
    [
        (lambda: OwnConfig(extr=4), ("OwnConfig has no field 'extr'", "did you mean extra")),
        (lambda: BareConfig(other=4), ("'other' stands in BareConfig", "@dataclass")),
        (lambda: BareConfig(othr=4), ("BareConfig has no field 'othr'",)),
    ],
    ids=["misspelt", "no dataclass", "unknown"],
)
def test_unknown_fields_of_a_client(make: Callable, mentions: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        make()
    assert [part for part in mentions if part not in str(caught.value)] == []
