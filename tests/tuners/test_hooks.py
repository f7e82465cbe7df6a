# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What clients put in the place of a tuner's methods acts: targets left out, sent elsewhere, made by themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, linears, llama, logits, randomise, refused, token_ids
from torch import nn

from peft import (
    AdaLoraConfig,
    AdaLoraModel,
    IA3Config,
    LoraConfig,
    LoraModel,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.error import PeftRuntimeError


X = torch.arange(16.0).reshape(2, 8) / 8
ORIGINAL = LoraModel._create_and_replace


class Clipped(nn.Module):
    """A linear layer inside of a module that limits what it gives; no method has a layer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-1, 1)


def config(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **options})


def replace(monkeypatch: pytest.MonkeyPatch, hook: Callable, cls: type = LoraModel) -> None:
    monkeypatch.setattr(cls, "_create_and_replace", hook)


def hands_on(self: Any, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return ORIGINAL(self, peft_config, adapter_name, target, *args, **kwargs)


@pytest.mark.parametrize("method", sorted(name for name in ("LORA", "ADALORA", "IA3", "VERA", "BOFT", "OFT", "HRA")))
def test_the_hook_is_called_for_each_target(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = BaseTuner._create_and_replace

    def hook(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kw):
        assert parent._modules[target_name] is target and not kw
        calls.append((adapter_name, type(target).__name__, target_name, current_key))
        result = original(self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kw)
        assert isinstance(parent._modules[target_name], BaseTunerLayer), "the layer is in its place already"
        return result

    for cls in (BaseTuner, AdaLoraModel):
        replace(monkeypatch, hook, cls)
    options = {"total_step": 3} if method == "ADALORA" else {}
    options.update({"feedforward_modules": []} if method == "IA3" else {})
    model = linears(8, 8, 8)
    model = get_peft_model(
        model, PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0", "1"], **options), adapter_name="a"
    )
    assert calls == [("a", "Linear", "0", "0"), ("a", "Linear", "1", "1")]
    assert model.targeted_module_names == ["0", "1"]


def test_a_target_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self, peft_config, adapter_name, target, *args, **kwargs):
        if kwargs["current_key"] == "1":
            return None
        return ORIGINAL(self, peft_config, adapter_name, target, *args, **kwargs)

    replace(monkeypatch, hook)
    model = linears(8, 8, 8, 8)
    with pytest.warns(UserWarning, match="hook, which stands .* has left out 1 of 3 targets, .*: 1$"):
        get_peft_model(model, config("0", "1", "2"))
    assert [isinstance(layer, LoraLayer) for layer in model] == [True, False, True]


def test_left_out_targets_are_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def hook(self, peft_config, adapter_name, target, target_name, *args, **kwargs):
        if target_name != "1":
            ORIGINAL(self, peft_config, adapter_name, target, target_name, *args, **kwargs)

    replace(monkeypatch, hook)
    with pytest.warns(UserWarning, match="left out"):
        model = get_peft_model(linears(8, 8, 8), config("0", "1"))
    assert model.targeted_module_names == ["0"]
    expected = model(X)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        again = PeftModel.from_pretrained(linears(8, 8, 8), tmp_path)
    assert_close(again(X), expected)
    assert_close(model.merge_and_unload()(X), expected)


def test_a_target_is_sent_to_a_layer_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kw):
        if isinstance(target, Clipped):
            parent, target, target_name = target, target.linear, "linear"
        return ORIGINAL(self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kw)

    net = nn.Sequential(nn.Linear(8, 8), Clipped())
    with refused(net, TypeError, "Clipped"):
        get_peft_model(net, config("0", "1"))
    replace(monkeypatch, hook)
    base = net(X)
    model = get_peft_model(net, config("0", "1", rank_pattern={"1": 3}))
    assert isinstance(net[1], Clipped) and isinstance(net[1].linear, Linear)
    assert net[1].linear.r == {"default": 3}, "patterns go by the name of the target"
    model.add_adapter("other", config("1"))
    assert set(net[1].linear.r) == {"default", "other"}
    expected = model(X)
    assert not torch.allclose(expected, base)
    with model.disable_adapter():
        assert_equal(model(X), base)
    assert_close(model.merge_and_unload()(X), expected)
    assert type(net[1].linear) is nn.Linear


def test_a_layer_that_no_method_has_is_refused_by_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, hands_on)
    net = nn.Sequential(nn.Linear(8, 8), Clipped())
    with refused(net, TypeError, "Clipped", "'1'"):
        get_peft_model(net, config("0", "1"))


class Own(Linear):
    """A layer of a client."""


@pytest.mark.parametrize("how", ["put", "returned"])
def test_a_client_makes_the_layer_by_itself(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kw):
        if isinstance(target, LoraLayer):
            target.update_layer(adapter_name, 2, lora_alpha=2, config=peft_config)
            return None
        layer = Own(target, adapter_name, config=peft_config, r=2, lora_alpha=2)
        if how == "put":
            setattr(parent, target_name, layer)
            return None
        return layer

    replace(monkeypatch, hook)
    net = linears(8, 8, 8)
    model = get_peft_model(net, config("0", "1"))
    model.add_adapter("other", config("0"))
    assert [type(layer) for layer in net] == [Own, Own] and set(net[0].r) == {"default", "other"}
    assert model.targeted_module_names == ["0"]
    expected = model(X)
    assert_close(model.merge_and_unload()(X), expected)


def test_on_one_tuner_alone() -> None:
    net = linears(8, 8, 8)
    model = get_peft_model(net, config("0"))
    tuner = model.base_model
    original, keys = tuner._create_and_replace, []

    def hook(*args: Any, current_key: str, **kwargs: Any) -> Any:
        keys.append(current_key)
        return original(*args, current_key=current_key, **kwargs)

    tuner._create_and_replace = hook
    model.add_adapter("other", config("1"))
    get_peft_model(linears(8, 8, 8), config("0"))
    assert keys == ["1"] and "other" in net[1].r


def test_a_config_of_the_client_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(self, peft_config, *args, **kwargs):
        peft_config = copy.copy(peft_config)
        peft_config.r = 5
        return ORIGINAL(self, peft_config, *args, **kwargs)

    replace(monkeypatch, hook)
    net = linears(8, 8)
    get_peft_model(net, config("0"))
    assert net[0].r == {"default": 5}


def leaves_out(*keys: str) -> Callable:
    def hook(self, *args, **kwargs):
        return None if kwargs["current_key"] in keys else ORIGINAL(self, *args, **kwargs)

    return hook


@pytest.mark.parametrize("left_out", ["model.embed_tokens", "lm_head"])
def test_one_of_two_tied_modules_cannot_be_left_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, leaves_out(left_out))
    model = llama(tied=True)
    with refused(model, ValueError, "model.embed_tokens", "lm_head", "left out", "Leave both out, or neither"):
        get_peft_model(model, config("q_proj", "embed_tokens", ensure_weight_tying=True))


def test_tied_modules_are_left_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, leaves_out("model.embed_tokens", "lm_head"))
    with pytest.warns(UserWarning, match="left out 2 of"):
        model = get_peft_model(llama(tied=True), config("q_proj", "embed_tokens", ensure_weight_tying=True))
    expected = logits(model, token_ids())
    assert_close(logits(model.merge_and_unload(), token_ids()), expected)


def wrong_adapter(self, peft_config, adapter_name, *args, **kwargs):
    return ORIGINAL(self, peft_config, "another", *args, **kwargs)


def wrong_parent(self, peft_config, adapter_name, target, target_name, parent, **kwargs):
    return ORIGINAL(self, peft_config, adapter_name, target, target_name, nn.ModuleDict(), **kwargs)


def wrong_target(self, peft_config, adapter_name, target, *args, **kwargs):
    return ORIGINAL(self, peft_config, adapter_name, target.weight, *args, **kwargs)


def returns_a_word(self, *args, **kwargs):
    return "done"


def returns_nothing(self, *args, **kwargs):
    return None


def raises_late(self, *args, **kwargs):
    ORIGINAL(self, *args, **kwargs)
    raise PeftRuntimeError("late")


@pytest.mark.parametrize(
    "hook, error, mentions",
    [
        (wrong_adapter, ValueError, ["'another'", "'default'", "pass on"]),
        (wrong_parent, ValueError, ["current_key='0'", "ModuleDict", "parent"]),
        (wrong_target, TypeError, ["current_key='0'", "Parameter"]),
        (returns_a_word, TypeError, ["returns_a_word", "str", "'0'"]),
        (returns_nothing, ValueError, ["returns_nothing", "any of 2 targets (0, 1)", "call the original"]),
        (raises_late, RuntimeError, ["late"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_is_refused_and_nothing_changed(
    hook: Callable, error: type, mentions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, hook)
    net = linears(8, 8, 8)
    with refused(net, error, *mentions):
        get_peft_model(net, config("0", "1"))
    monkeypatch.undo()
    model = get_peft_model(net, config("0"))
    replace(monkeypatch, hook)
    with refused(model, error, *[mention for mention in mentions if mention not in ("'default'",)]):
        model.add_adapter("b", config("0", "1"))


def test_it_is_for_injections_only() -> None:
    model = get_peft_model(linears(8, 8, 8), config("0"))
    base = model.get_base_model()
    with refused(model, RuntimeError, "LoraModel._create_and_replace", "get_peft_model, add_adapter"):
        model.base_model._create_and_replace(config("1"), "default", base[1], "1", base, current_key="1")


def test_lora_and_adalora_are_replaced_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client keeps what it replaces in an attribute of each class, and calls it by that."""
    calls = []

    def hook(self, *args, **kwargs):
        calls.append(type(self))
        return self._origin(*args, **kwargs)

    for cls in (LoraModel, AdaLoraModel):
        monkeypatch.setattr(cls, "_origin", cls._create_and_replace, raising=False)
        replace(monkeypatch, hook, cls)
    get_peft_model(linears(8, 8), config("0"))
    get_peft_model(linears(8, 8), AdaLoraConfig(target_modules=["0"], total_step=3))
    assert calls == [LoraModel, AdaLoraModel]


def test_parameters_are_hooked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def hook(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kw):
        calls.append((type(target).__name__, current_key, kw))
        return ORIGINAL(self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kw)

    replace(monkeypatch, hook)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    net[0].self_attn.extra = nn.Parameter(torch.zeros(8, 8))
    targets = ["self_attn.in_proj_weight", "self_attn.extra"]
    model = get_peft_model(net, config(target_modules=[], target_parameters=targets))
    assert [call[1:] for call in calls] == [
        (f"0.{name}", {"parameter_name": name.rpartition(".")[2]}) for name in targets
    ]
    assert calls[1][0] == "ParamWrapper", "the second one stands around the first"
    assert sorted(model.targeted_parameter_names) == sorted(f"0.{name}" for name in targets)


def test_parameters_are_chosen_by_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def inject(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        self._check_target_module_compatiblity(peft_config, model, "0")
        self._create_and_replace(
            peft_config, adapter_name, model[0], "0", model, current_key="0.weight", parameter_name="weight"
        )
        return ["0.weight"]

    monkeypatch.setattr(BaseTuner, "_inject_parameters", inject)
    net = linears(8, 8, 8)
    model = get_peft_model(net, config(target_modules=[], target_parameters=["0.weight", "1.weight"]))
    assert type(net[0]).__name__ == "ParamWrapper" and type(net[1]) is nn.Linear
    assert model.targeted_parameter_names == ["0.weight"]


def test_the_check_of_names_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BaseTuner._check_target_module_exists

    def check(config: Any, key: str) -> bool:
        return key != "1" and original(config, key)

    monkeypatch.setattr(BaseTuner, "_check_target_module_exists", staticmethod(check))
    assert get_peft_model(linears(8, 8, 8), config("0", "1")).targeted_module_names == ["0"]


def test_the_cast_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LoraModel._cast_adapter_dtype

    def cast(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        original(self, adapter_name, autocast_adapter_dtype and adapter_name != "low")

    monkeypatch.setattr(LoraModel, "_cast_adapter_dtype", cast)
    net = linears(8, 8).to(torch.bfloat16)
    model = get_peft_model(net, config("0"), adapter_name="low")
    model.add_adapter("high", config("0"))
    assert {name: factor.weight.dtype for name, factor in net[0].lora_A.items()} == {
        "low": torch.bfloat16,
        "high": torch.float32,
    }
    model.base_model._cast_adapter_dtype("low")
    original(model.base_model, "low")
    assert net[0].lora_A["low"].weight.dtype == torch.float32


def test_unloading_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = BaseTuner._unload_and_optionally_merge, []

    def unload(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        calls.append(type(model))
        return model

    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unload)
    others = IA3Config(target_modules=["0"], feedforward_modules=[]), VeraConfig(target_modules=["0"])
    for config_ in (config("0"), *others):
        model = get_peft_model(linears(8, 8), config_)
        randomise(model, "lora_|ia3_|vera_lambda")
        expected = model(X)
        assert_close(copy.deepcopy(model).merge_and_unload()(X), expected)
        model.unload()
    assert calls == [nn.Sequential] * 6
