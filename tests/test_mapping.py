# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The registry of methods, the lazy names, and the two ways in: `get_peft_model` and `inject_adapter_in_model`."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from support.helpers import (
    assert_equal,
    bert_classifier,
    features,
    llama,
    logits,
    opt,
    randomise,
    refused,
    stack,
    warned,
)
from support.registry import methods_put_back
from torch import nn

import peft
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
    registry,
)
from peft.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


# ------------------------------------------------------------------------------------------ the registry
@pytest.mark.parametrize("key", ["LORA", PeftType.LORA])
def test_lora_is_registered(key: str) -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[key] is LoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "lora_"
    assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING[key] is LoraModel


def test_tables_are_mappings_by_method() -> None:
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        assert len(table) == len(list(table))
        assert PeftType.LORA in table and "WARP" not in table
        assert all(isinstance(key, PeftType) for key in table)
        with refused(None, KeyError, "WARP", "LORA"):
            table["WARP"]


@dataclass
class OwnConfig(LoraConfig):
    """A config of a method that a user registers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OWN_METHOD"


class OwnModel(LoraModel):
    """Its tuner, which is LoRA under another name."""


@pytest.fixture
def own_method() -> Iterator[None]:
    """Register a method for one test."""
    with methods_put_back():
        register_peft_method(name="own_method", config_cls=OwnConfig, model_cls=OwnModel, prefix="lora_")
        yield


@pytest.mark.usefixtures("own_method")
def test_registered_method_works_like_any_other() -> None:
    assert PEFT_TYPE_TO_PREFIX_MAPPING["OWN_METHOD"] == "lora_"
    assert "OWN_METHOD" not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft.get_peft_config({"peft_type": "OWN_METHOD", "r": 3}) == OwnConfig(r=3)
    model = get_peft_model(stack(), OwnConfig(target_modules=["head"]))
    assert type(model.base_model) is OwnModel


@pytest.mark.usefixtures("own_method")
def test_registered_method_beside_another_one_is_refused() -> None:
    model = get_peft_model(stack(), OwnConfig(target_modules=["head"]))
    with refused(model, ValueError, "OWN_METHOD", "LORA"):
        model.add_adapter("other", LoraConfig(target_modules=["head"]))


@pytest.mark.parametrize("name", ["lora", "LoRA", "LORA"])
def test_a_name_is_registered_once(name: str) -> None:
    with refused(None, ValueError, "LORA", "another name"):
        register_peft_method(name=name, config_cls=OwnConfig, model_cls=OwnModel)


def test_prefix_follows_from_the_name() -> None:
    with methods_put_back():
        register_peft_method(name="own_method", config_cls=OwnConfig, model_cls=OwnModel, is_mixed_compatible=True)
        assert PEFT_TYPE_TO_PREFIX_MAPPING["OWN_METHOD"] == "own_method_"
        assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING["OWN_METHOD"] is OwnModel


def test_old_paths_give_what_the_registry_has() -> None:
    for name in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
        name = f"PEFT_TYPE_TO_{name}_MAPPING"
        assert getattr(peft.mapping, name) is getattr(registry, name)
    for name in ("PeftType", "TaskType", "register_peft_method"):
        assert getattr(peft.utils.peft_types, name) is getattr(peft.utils, name) is getattr(registry, name)


def test_listing_methods_loads_no_torch() -> None:
    code = (
        "import sys; from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING as table;"
        "assert list(table) and table['LORA']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ names of the package
def test_public_names_resolve() -> None:
    assert {name: getattr(peft, name) for name in peft.__all__}.keys() == set(peft.__all__)
    assert set(peft.__all__) <= set(dir(peft))
    assert peft.tuners.lora.layer.Linear.__module__ == "peft.tuners.lora.layer"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = peft.no_such_name


# ------------------------------------------------------------------------------------------ get_peft_model
@pytest.mark.parametrize(
    ("task", "cls", "build"),
    [
        (None, "PeftModel", llama),
        ("CAUSAL_LM", "PeftModelForCausalLM", llama),
        ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM", llama),
        ("FEATURE_EXTRACTION", "PeftModelForFeatureExtraction", llama),
        ("SEQ_CLS", "PeftModelForSequenceClassification", bert_classifier),
        ("TOKEN_CLS", "PeftModelForTokenClassification", bert_classifier),
        ("QUESTION_ANS", "PeftModelForQuestionAnswering", bert_classifier),
    ],
)
def test_task_picks_the_class(task: str | None, cls: str, build: type) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the task is")  # some of these models are for another one
        model = get_peft_model(build(), LoraConfig(r=2, task_type=task))
    assert type(model) is getattr(peft, cls)
    assert isinstance(model, PeftModel)


def test_config_of_the_caller_is_not_changed() -> None:
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    before = config.to_dict()
    first, second = (get_peft_model(bert_classifier(), config) for _ in range(2))
    assert config.to_dict() == before
    assert first.peft_config["default"] is not second.peft_config["default"]
    assert first.targeted_module_names == second.targeted_module_names


def test_revision_is_noted() -> None:
    config = LoraConfig(target_modules=["head"])
    assert get_peft_model(stack(), config, revision="v1").peft_config["default"].revision == "v1"
    with warned("v1", "v0"):
        get_peft_model(stack(), LoraConfig(target_modules=["head"], revision="v0"), revision="v1")


def test_wrapping_twice_is_warned_about() -> None:
    base = stack()
    model = get_peft_model(base, LoraConfig(target_modules=["head"]))
    with warned("add_adapter", "unload"):
        get_peft_model(model, LoraConfig(target_modules=["head"]))
    with warned("default", "unload"):
        get_peft_model(base, LoraConfig(target_modules=["head"]), adapter_name="other")


@pytest.mark.parametrize("way_back", ["unload", "merge_and_unload"])
def test_wrapping_again_after_unloading(way_back: str) -> None:
    base = getattr(get_peft_model(stack(), LoraConfig(target_modules=["head"])), way_back)()
    assert not hasattr(base, "peft_config")
    assert get_peft_model(base, LoraConfig(target_modules=["up"])).targeted_module_names == [
        "layers.0.up",
        "layers.1.up",
        "layers.2.up",
    ]


# ------------------------------------------------------------------------------------------ default targets
def test_default_targets_depend_on_the_model_type() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"q_proj", "v_proj"}
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("build", "task", "expected"),
    [
        (llama, None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (opt, None, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        (bert_classifier, "SEQ_CLS", {"query", "key", "value", "dense"}),
        (stack, None, {"up", "down", "head"}),
    ],
)
def test_all_linear_leaves_out_the_head(build: type, task: str | None, expected: set[str]) -> None:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", task_type=task))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == expected


def test_layer_selection_on_a_model() -> None:
    config = LoraConfig(target_modules=["up", "down"], layers_to_transform=[0, 2], exclude_modules=["layers.2.up"])
    model = get_peft_model(stack(), config)
    assert model.targeted_module_names == ["layers.0.up", "layers.0.down", "layers.2.down"]


# ------------------------------------------------------------------------------------------ inject_adapter_in_model
def test_injection_returns_the_model_itself() -> None:
    base = stack()
    expected = logits(base, features())
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), base)
    assert model is base and list(model.peft_config) == ["default"]
    assert_equal(logits(model, features()), expected)
    randomise(model)
    assert not torch.equal(logits(model, features()), expected)


def test_second_injection_goes_beside_the_first() -> None:
    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), stack(), adapter_name="a")
    with warned("a", "b"):
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["head"]), base, adapter_name="b")
    assert base.head.available_adapters == {"a", "b"}
    assert base.head.active_adapters == ["b"]
    assert list(base.peft_config) == ["a", "b"]


def test_prompt_learning_cannot_be_injected() -> None:
    base = llama()
    with refused(base, ValueError, "get_peft_model"):
        inject_adapter_in_model(peft.PromptLearningConfig(peft_type="PROMPT_TUNING"), base)


@pytest.mark.parametrize("config", [{"r": 4}, None, LoraConfig])
def test_what_is_no_config_is_refused(config: object) -> None:
    base = stack()
    with refused(base, TypeError, "PeftConfig"):
        get_peft_model(base, config)


def test_config_without_a_method_is_refused() -> None:
    base = stack()
    with refused(base, KeyError, "LORA"):
        get_peft_model(base, PeftConfig())


def test_module_with_two_names_is_one_target() -> None:
    layer = nn.Linear(8, 8)
    base = nn.ModuleDict({"first": layer, "second": layer, "other": nn.Linear(8, 8)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["second"]))
    assert model.targeted_module_names == ["first"]
    assert base["first"] is base["second"] and base["first"].base_layer is layer
    assert type(base["other"]) is nn.Linear
