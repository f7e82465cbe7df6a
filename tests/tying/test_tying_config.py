# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The config's part in weight tying: a saved field that asks for it, and a run-time record that is never saved."""

import copy
import dataclasses
import inspect
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
from support.method_options import REQUIRED

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PromptLearningConfig,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING


def test_tying_is_off_unless_asked_for():
    assert LoraConfig().ensure_weight_tying is False


@pytest.mark.parametrize("value", [True, False])
def test_field_survives_saving(tmp_path, value):
    LoraConfig(ensure_weight_tying=value).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).ensure_weight_tying is value


def test_files_without_the_field_mean_off(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["ensure_weight_tying"]
    path.write_text(json.dumps(content))
    assert PeftConfig.from_pretrained(tmp_path).ensure_weight_tying is False


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_only_booleans_are_taken(value):
    with pytest.raises(TypeError, match="ensure_weight_tying must be True or False"):
        LoraConfig(ensure_weight_tying=value)


def test_record_of_a_run_is_never_saved(tmp_path):
    config = LoraConfig(ensure_weight_tying=True)
    assert config.modules_to_tie is None
    config.modules_to_tie = {"lm_head": "model.embed_tokens"}
    config.save_pretrained(tmp_path)
    assert "modules_to_tie" not in config.to_dict()
    assert "modules_to_tie" not in (tmp_path / "adapter_config.json").read_text()
    assert PeftConfig.from_pretrained(tmp_path).modules_to_tie is None


# ------------------------------------------------------------------------------------------ every config
@dataclass
class _OfSomebodyElse(PeftConfig):
    """A config that knows of the released package only."""

    target_modules: list[str] | None = None
    rank: int = 4


CONFIGS = [*PEFT_TYPE_TO_CONFIG_MAPPING.values(), PromptLearningConfig, _OfSomebodyElse]


def values_for(config_cls: type) -> dict[str, Any]:
    """Give what a config cannot be built without."""
    required = {PEFT_TYPE_TO_CONFIG_MAPPING[method]: fields for method, fields in REQUIRED.items()}
    return required.get(config_cls, {})


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_signature_shows_every_field_in_its_place(config_cls):
    shown = inspect.signature(config_cls).parameters
    fields = [f for f in dataclasses.fields(config_cls) if f.init]
    assert list(shown) == [f.name for f in fields if not f.kw_only] + [f.name for f in fields if f.kw_only]
    assert list(inspect.signature(config_cls.__init__).parameters) == ["self", *shown]
    assert {name for name, given in shown.items() if given.kind is given.KEYWORD_ONLY} <= {"ensure_weight_tying"}


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_flag_is_a_field(config_cls, tmp_path):
    values = values_for(config_cls)
    asked, plain = config_cls(**values, ensure_weight_tying=True), config_cls(**values)
    assert asked != plain and asked == config_cls(**values, ensure_weight_tying=True)
    assert "ensure_weight_tying=True" in repr(asked)
    for again in (dataclasses.replace(asked), copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert again == asked and again.ensure_weight_tying
    with pytest.raises(TypeError, match="ensure_weight_tying must be True or False, found 'yes'"):
        config_cls(**values, ensure_weight_tying="yes")
    released = issubclass(config_cls, LoraConfig)  # what reads files knows the field there
    assert asked.to_dict()["ensure_weight_tying"] is True
    assert ("ensure_weight_tying" in plain.to_dict()) is released


@pytest.mark.parametrize("config_cls", CONFIGS)
def test_misspelt_field_is_named_with_the_one_that_was_meant(config_cls):
    with pytest.raises(TypeError, match="has no field 'ensure_weight_tieing'; did you mean ensure_weight_tying"):
        config_cls(ensure_weight_tieing=True)


def test_configs_that_take_more_than_fields_decide_themselves():
    class Wrapped(LoraConfig):
        def __init__(self, size, **kwargs):
            super().__init__(r=size, **kwargs)

    assert Wrapped(size=3, lora_alpha=5, ensure_weight_tying=True) == Wrapped(
        3, lora_alpha=5, ensure_weight_tying=True
    )
    with pytest.raises(TypeError, match="lora_alhpa"):
        Wrapped(3, lora_alhpa=5)


# ------------------------------------------------------------------------------------------ options of functions
FIT = {"strict", "ignore_mismatched_sizes"}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (PeftModel.save_pretrained, {"deduplicate_tied", "state_dict"}),
        (PeftModel.push_to_hub, {"deduplicate_tied"}),
        (PeftModel.from_pretrained, FIT),
        (PeftModel.load_adapter, FIT),
        (PeftMixedModel.from_pretrained, FIT),
        (PeftMixedModel.load_adapter, FIT),
        (AutoPeftModelForCausalLM.from_pretrained, FIT),
    ],
)
def test_options_beyond_the_release_are_shown(function, options):
    shown = inspect.signature(function).parameters
    assert options <= {name for name, given in shown.items() if given.kind is given.KEYWORD_ONLY}
