# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Fields that configs of many methods share."""

import dataclasses
import inspect
from dataclasses import MISSING, dataclass
from typing import Any

import pytest

from peft.config import PromptLearningConfig, TyingConfig
from peft.configs.fields import Names, option, shared_field
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING


SHARED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "ensure_weight_tying",
)
# what is called like a shared field and means something else
OTHERS = {
    ("AdaLoraConfig", "rank_pattern"),
    ("AdaptionPromptConfig", "target_modules"),  # one name of attention modules, no pattern
    ("OSFConfig", "rank_pattern"),  # regular expressions only, for leading directions that stay
    ("TrainableTokensConfig", "target_modules"),
}


def start_and_text(field: dataclasses.Field) -> tuple[Any, str]:
    """What a field starts with, and what is said of it."""
    return (field.default if field.default_factory is MISSING else field.default_factory()), field.metadata["help"]


@pytest.mark.parametrize("config_cls", [*PEFT_TYPE_TO_CONFIG_MAPPING.values(), PromptLearningConfig])
def test_shared_fields_are_declared_once(config_cls: type) -> None:
    for field in dataclasses.fields(config_cls):
        if field.name in SHARED and (config_cls.__name__, field.name) not in OTHERS:
            assert start_and_text(field) == start_and_text(shared_field(field.name)), field.name


@pytest.mark.parametrize("config_cls", [*PEFT_TYPE_TO_CONFIG_MAPPING.values(), PromptLearningConfig])
def test_every_field_is_shown_and_says_what_it_is_for(config_cls: type) -> None:
    fields = [field for field in dataclasses.fields(config_cls) if field.init]
    assert set(inspect.signature(config_cls).parameters) == {field.name for field in fields}
    assert "ensure_weight_tying" in inspect.signature(config_cls).parameters
    assert [field.name for field in fields if not field.metadata.get("help")] == []


def test_place_of_a_shared_field_is_that_of_its_declaration() -> None:
    @dataclass
    class OwnConfig(TyingConfig):
        block_size: int = option(4, "Features per block.")
        target_modules: Names = shared_field("target_modules")
        rank_pattern: dict | None = shared_field("rank_pattern")

    assert list(inspect.signature(OwnConfig).parameters)[-4:] == [
        "block_size",
        "target_modules",
        "rank_pattern",
        "ensure_weight_tying",
    ]
    assert OwnConfig().rank_pattern == {} and OwnConfig().rank_pattern is not OwnConfig().rank_pattern


def test_settings_join_what_is_declared() -> None:
    field = shared_field("bias", kw_only=True, metadata={"written_if_set": True})
    assert field.kw_only and field.metadata["written_if_set"] and start_and_text(field)[0] == "none"


def test_field_that_is_not_shared() -> None:
    with pytest.raises(KeyError, match="block_size"):
        shared_field("block_size")
