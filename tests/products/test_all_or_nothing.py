# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What changes a model does so as a whole or not at all: method x entrance x place of the failure.

An entrance is called with a fault in it: one of the package's own functions that it calls raises, the very last ones
among them. Afterwards the model has to be what it was, down to the identity of each object that its modules hold.
"""

import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import llama, randomise, refused, seeded, snapshot
from support.method_options import OPTIONS, SECOND, is_mergeable, layered_methods
from torch import nn

import peft
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.config import PeftConfig, PromptLearningConfig
from peft.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from peft.layers import base_changes, undo
from peft.layers.merging.model import merge_layers
from peft.layers.undo import keep_values, on_failure
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.surgery import transaction
from peft.surgery.transaction import all_or_nothing


pytestmark = pytest.mark.filterwarnings("ignore")

PACKAGE = os.path.dirname(peft.__file__)
# functions that are part of putting things back do not fail
TRUSTED = tuple(module.__file__ for module in (base_changes, transaction, undo))


# ------------------------------------------------------------------------------------------ faults
class Fault(BaseException):
    """What nobody expects, such as the key that interrupts a program."""


class Calls:
    """Counts calls of the package's functions, and raises at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last = 0, last

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        """Notice an event of the interpreter."""
        code = frame.f_code
        name = code.co_filename
        if event != "call" or not name.startswith(PACKAGE) or name in TRUSTED or code.co_name == "<module>":
            return
        if code.co_flags & inspect.CO_GENERATOR:  # may be entered to be closed, where nothing can be raised
            return
        self.count += 1
        if self.count == self.last:
            raise Fault


@contextmanager
def noticing(calls: Calls) -> Iterator[None]:
    sys.setprofile(calls)
    try:
        yield
    finally:
        sys.setprofile(None)


# ------------------------------------------------------------------------------------------ what a model is
def content_of(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, id(held)) for key, held in value.items()]
    if isinstance(value, (list, tuple)):
        return [id(held) for held in value]
    return set(value) if isinstance(value, set) else None


def everything(model: nn.Module) -> tuple[dict, list]:
    """
    Say what a model is: each attribute of each module by identity, with what containers hold; and all values.

    Returns:
        That, and references to all objects, without which another one could get the identity of one that is gone.
    """
    found, alive = {"": snapshot(model)}, [model]
    for name, module in model.named_modules():
        things = {"": module}
        if "_merge_state" in module.__dict__:
            things["merge state"] = module._merge_state
            things.update((f"original {i}", thing) for i, thing in enumerate(module._merge_state.originals))
        configs = module.__dict__.get("peft_config") or {}
        things.update((f"config {key}", config) for key, config in configs.items())
        for kind, thing in things.items():
            found[name, kind] = {key: (id(value), content_of(value)) for key, value in thing.__dict__.items()}
            alive.append(dict(thing.__dict__))
            alive.append([copy.copy(value) for value in thing.__dict__.values() if content_of(value) is not None])
        hooks = [hook for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
        owners = [hook.__self__ for hook in hooks if hasattr(hook, "__self__")]
        found[name, "hooks"] = [{key: repr(value) for key, value in vars(owner).items()} for owner in owners]
    return found, alive


def differences(before: dict, after: dict) -> dict:
    found = {}
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old != new and isinstance(old, dict) and isinstance(new, dict):
            found[key] = {k: (old.get(k), new.get(k)) for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
        elif old != new:
            found[key] = (old, new)
    return found


# ------------------------------------------------------------------------------------------ models and configs
class Tied(nn.Module):
    """An embedding, a body, a norm and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.norm = nn.Embedding(20, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids to logits."""
        return self.head(self.norm(torch.tanh(self.body(self.emb(ids)))))


def net() -> nn.Module:
    with seeded():
        return Tied().eval()


def config(method: str, **changes: Any) -> PeftConfig:
    """A config that adapts the body and trains the tied embedding and head in full, as far as a method can."""
    name, _, variant = method.partition("-")
    config_cls, kinds = PEFT_TYPE_TO_CONFIG_MAPPING[name], tuple(PEFT_TYPE_TO_TUNER_MAPPING[name].layer_classes)
    targets = [[name] for name in ("body", "norm") if isinstance(getattr(net(), name), kinds)] + [["emb", "head"]]
    options = {"target_modules": targets[0], **OPTIONS.get(name, {})}
    if "modules_to_save" in config_cls.__dataclass_fields__:
        options["modules_to_save"] = ["head"]
    if name == "IA3":
        options["feedforward_modules"] = ["body"]
    options.update(VARIANTS.get(variant, {}))
    return config_cls(**{**options, "ensure_weight_tying": True, **changes})


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "invoked": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    "bias": {"bias": "all"},
    "tokens": {"trainable_token_indices": {"emb": [1, 2]}, "modules_to_save": None},
    "targets": {"target_modules": ["emb", "head"], "modules_to_save": ["norm"]},
}
LAYERED = [*layered_methods(), *(f"LORA-{name}" for name in VARIANTS)]
# those that need nothing beside their layers
INJECTABLE = [name for name in LAYERED if not PEFT_TYPE_TO_TUNER_MAPPING[name.partition("-")[0]].uses_shared_state]
PROMPTS = [
    str(getattr(key, "value", key))
    for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if issubclass(cls, PromptLearningConfig)
]


def second(method: str) -> PeftConfig:
    return config(method, **SECOND.get(method.partition("-")[0], {}))


def prompt(method: str, **changes: Any) -> PeftConfig:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "modules_to_save": ["lm_head"], **changes}
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](**options)


def is_prompt(method: str) -> bool:
    return method in PROMPTS


def base(method: str) -> nn.Module:
    return llama() if is_prompt(method) else net()


def first(method: str) -> PeftConfig:
    return prompt(method) if is_prompt(method) else config(method)


def adapted(method: str) -> PeftModel:
    model = get_peft_model(base(method), first(method), "a").eval()
    randomise(model, r"\.a\b|\.a\.")
    return model


def saved(method: str, folder: Path) -> Path:
    if not folder.exists():
        model = get_peft_model(base(method), first(method)).eval()
        randomise(model, r"\.default\b|\.default\.", seed=5)
        model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------ entrances
def merged(method: str) -> nn.Module:
    """A model without a wrapper whose adapter is merged, if it can be."""
    model = inject_adapter_in_model(config(method), net(), "a")
    randomise(model, r"\.a\b|\.a\.")
    if can_merge(method):
        merge_layers(model)
    return model


def can_merge(method: str) -> bool:
    return method != "LORA-invoked" and is_mergeable(method)


def two(method: str) -> PeftModel:
    model = adapted(method)
    model.add_adapter("b", second(method))
    return model


def tensors(method: str, seed: int = 9) -> dict[str, torch.Tensor]:
    model = adapted(method)
    randomise(model, r"\.a\b|\.a\.", seed=seed)
    return get_peft_model_state_dict(model, adapter_name="a")


Entrance = tuple[Callable[[str], nn.Module], Callable[[nn.Module, str, Path], Any]]

FOR_ALL: dict[str, Entrance] = {
    "get_peft_model": (base, lambda model, method, folder: get_peft_model(model, first(method))),
    "from_pretrained": (base, lambda model, method, folder: PeftModel.from_pretrained(model, saved(method, folder))),
    "add_adapter": (
        adapted,
        lambda model, method, folder: model.add_adapter("b", prompt(method) if is_prompt(method) else second(method)),
    ),
    "load_adapter": (adapted, lambda model, method, folder: model.load_adapter(saved(method, folder), "b")),
    "load_adapter_again": (adapted, lambda model, method, folder: model.load_adapter(saved(method, folder), "a")),
    "set_state_dict": (
        adapted,
        lambda model, method, folder: set_peft_model_state_dict(model, tensors(method), adapter_name="a"),
    ),
}
FOR_LAYERS: dict[str, Entrance] = {
    "inject": (base, lambda model, method, folder: inject_adapter_in_model(config(method), model, "a")),
    "inject_again": (merged, lambda model, method, folder: inject_adapter_in_model(config(method), model, "a")),
    "inject_on_meta": (
        base,
        lambda model, method, folder: inject_adapter_in_model(config(method), model, low_cpu_mem_usage=True),
    ),
}
FOR_LORA: dict[str, Entrance] = {
    "mixed": (
        lambda method: get_peft_model(net(), config("LORA"), "a", mixed=True),
        lambda model, method, folder: model.add_adapter("b", LoHaConfig(target_modules=["body", "emb"][:1])),
    ),
    "hotswap": (
        adapted,
        lambda model, method, folder: hotswap_adapter_from_state_dict(
            model, tensors(method), "a", config(method, r=2)
        ),
    ),
    "prepare_hotswap": (
        adapted,
        lambda model, method, folder: prepare_model_for_compiled_hotswap(model, target_rank=5),
    ),
    "add_weighted_adapter": (
        lambda method: two_for_sum(),
        lambda model, method, folder: model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum"),
    ),
}


def two_for_sum() -> PeftModel:
    plain = LoraConfig(r=2, target_modules=["body"], init_lora_weights=False)
    model = get_peft_model(net(), plain, "a")
    model.add_adapter("b", plain)
    return model


CASES = [(method, entrance) for method in (*LAYERED, *PROMPTS) for entrance in FOR_ALL]
CASES += [(method, entrance) for method in INJECTABLE for entrance in FOR_LAYERS]
CASES += [("LORA", entrance) for entrance in FOR_LORA]
# biases exist once, and a start that changes the base model comes before all other adapters
CASES = [
    (method, entrance)
    for method, entrance in CASES
    if method not in ("LORA-bias", "LORA-pissa") or entrance not in ("add_adapter", "load_adapter")
]
# the default run has all that concerns LoRA, and a third of the rest: each method, and each entrance with some of them
SOME = [case for number, case in enumerate(CASES) if case[0] == "LORA" or number % 3 == 0]


def points(count: int, wide: bool) -> list[int]:
    """Choose calls to fail at: the last ones, and some on the way."""
    if not wide:
        return sorted({max(2 * count // 3, 1), count})
    return sorted({*range(1, count, max(count // 60, 1)), *range(max(count - 25, 1), count + 1)})


def check(method: str, entrance: str, tmp_path: Path, wide: bool) -> None:
    build, call = {**FOR_ALL, **FOR_LAYERS, **FOR_LORA}[entrance]
    folder = tmp_path / "saved"
    for _ in range(2):  # the second time nothing is imported or read for the first time any more
        model, calls = build(method), Calls()
        prepared = prepared_call(call, model, method, folder)
        with noticing(calls):
            prepared()
    assert calls.count > 3
    model = build(method)
    prepared = prepared_call(call, model, method, folder)
    before, alive = everything(model)
    for point in points(calls.count, wide):
        with pytest.raises(Fault), noticing(Calls(point)):
            prepared()
        after, _ = everything(model)
        assert differences(before, after) == {}, f"call {point} of {calls.count}"
    prepared()
    assert alive, "what is gone is compared by identity, so it has to be kept until here"


def prepared_call(call: Callable, model: nn.Module, method: str, folder: Path) -> Callable[[], Any]:
    """Make what an entrance is given beforehand, so that faults are in the entrance itself."""
    saved(method, folder)
    values = tensors(method) if call in (FOR_ALL["set_state_dict"][1], FOR_LORA["hotswap"][1]) else None
    if call is FOR_ALL["set_state_dict"][1]:
        return lambda: set_peft_model_state_dict(model, values, adapter_name="a")
    if call is FOR_LORA["hotswap"][1]:
        other = config(method, r=2)
        return lambda: hotswap_adapter_from_state_dict(model, values, "a", other)
    return lambda: call(model, method, folder)


@pytest.mark.parametrize(("method", "entrance"), SOME)
def test_a_failure_leaves_the_model_as_it_was(method: str, entrance: str, tmp_path: Path) -> None:
    check(method, entrance, tmp_path, wide=False)


@pytest.mark.wide
@pytest.mark.parametrize(("method", "entrance"), CASES)
def test_a_failure_anywhere_leaves_the_model_as_it_was(method: str, entrance: str, tmp_path: Path) -> None:
    check(method, entrance, tmp_path, wide=True)


# ------------------------------------------------------------------------------------------ refusals
def test_a_refused_prompt_keeps_its_network() -> None:
    model = adapted("P_TUNING")
    table = model.prompt_encoder["a"].finished_table()
    with refused(model, ValueError):
        set_peft_model_state_dict(model, {"prompt_embeddings": torch.full_like(table, torch.nan)}, adapter_name="a")
    assert model.prompt_encoder["a"].is_computed


class Unique(nn.Linear):
    """A layer that cannot be copied."""

    def __deepcopy__(self, memo: dict) -> nn.Module:
        raise RuntimeError("there is one of these")


@pytest.mark.parametrize("way", ["get_peft_model", "inject", "add_adapter"])
def test_a_saved_module_that_cannot_be_copied(way: str) -> None:
    model = net()
    model.head = Unique(16, 20)
    if way == "add_adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["body"]))
    before, alive = everything(model)
    asked = LoraConfig(r=2, target_modules=["body", "emb"], modules_to_save=["head"])
    with pytest.raises(RuntimeError, match="one of these"):
        if way == "get_peft_model":
            get_peft_model(model, asked)
        elif way == "inject":
            inject_adapter_in_model(asked, model)
        else:
            model.add_adapter("other", asked)
    assert differences(before, everything(model)[0]) == {} and alive


@pytest.mark.parametrize("method", [method for method in INJECTABLE if can_merge(method)])
def test_a_refused_injection_keeps_the_old_adapter_merged(method: str) -> None:
    model = merged(method)
    before, alive = everything(model)
    asked = config(method)
    asked.target_modules = ["nowhere"]
    with pytest.raises(ValueError, match="nowhere"):
        inject_adapter_in_model(asked, model, "a")
    assert differences(before, everything(model)[0]) == {} and alive


# ------------------------------------------------------------------------------------------ the context itself
def test_nested_contexts_are_one() -> None:
    model = net()
    before, alive = everything(model)
    with pytest.raises(Fault), all_or_nothing(model):
        with all_or_nothing(model):
            model.extra = nn.Linear(2, 2)
            model.body.weight.requires_grad_(False)
        raise Fault
    assert differences(before, everything(model)[0]) == {} and alive


def test_values_and_ways_back() -> None:
    model, notes = net(), ["old"]
    before, alive = everything(model)
    with pytest.raises(Fault), all_or_nothing(model):
        keep_values([model.body.weight, torch.ones(1)])
        with torch.no_grad():
            model.body.weight.zero_()
        model.body.weight.data = torch.ones(3)
        on_failure(notes.clear)
        on_failure(lambda: notes.append("last"))
        raise Fault
    assert differences(before, everything(model)[0]) == {} and alive
    assert notes == []
    keep_values([model.body.weight])  # outside of a context nothing happens
    on_failure(notes.clear)


def test_what_happened_stays() -> None:
    model = net()
    with all_or_nothing(model):
        keep_values([model.body.weight])
        with torch.no_grad():
            model.body.weight.zero_()
        model.extra = 3
    assert model.extra == 3 and not model.body.weight.any()
