# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""From a config to the modules that it reaches: what is said about it, and what the config says afterwards."""

from typing import Any

import pytest
from support.helpers import refused, stack, warned
from support.helpers import stack_config as config
from torch import nn

from peft import LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.anatomy.matching import shortest_endings


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


class Many(nn.Module):
    """Thirty blocks of two layers."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(30):
            self.add_module(str(i), nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}))


def names(count: int) -> set[str]:
    """Full names of the first layers called q."""
    return {f"{i}.q" for i in range(count)}


# ------------------------------------------------------------------------------------------ long lists
@pytest.mark.parametrize(
    ("options", "targets", "reached"),
    [
        ({"target_modules": names(30)}, {"q"}, names(30)),
        ({"target_modules": names(30) | {"0.k"}}, {"q", "0.k"}, names(30) | {"0.k"}),
        ({"target_modules": names(29)}, names(29), names(29)),
        ({"target_modules": names(19)}, names(19), names(19)),
        ({"target_modules": names(30), "exclude_modules": ["3.q"]}, {"q"}, names(30) - {"3.q"}),
        ({"target_modules": r"\d+\.q"}, r"\d+\.q", names(30)),
        ({"target_modules": "all-linear"}, {"q", "k"}, {f"{i}.{key}" for i in range(30) for key in "qk"}),
    ],
)
@pytest.mark.parametrize("config_cls", [LoraConfig, LoHaConfig])
def test_a_long_list_becomes_the_fewest_endings(config_cls: type, options: Any, targets: Any, reached: set) -> None:
    model = get_peft_model(Many(), config_cls(r=1, **options))
    assert set(model.targeted_module_names) == reached
    assert model.peft_config["default"].target_modules == targets


def test_full_names_that_pass_by_the_choice_of_layers_stay() -> None:
    """A full name is reached whatever the layers are; its ending would not be."""
    base = nn.Module()
    base.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(30))
    wanted = {f"layers.{i}.q" for i in range(30)}
    model = get_peft_model(base, LoraConfig(r=1, target_modules=wanted, layers_to_transform=[0]))
    assert set(model.targeted_module_names) == model.peft_config["default"].target_modules == wanted


def test_endings_reach_no_other_name() -> None:
    assert shortest_endings(["a.q", "b.q", "b.k"], ["a.k", "a", "b", "c.q"]) == {"a.q", "b.q", "b.k"}
    assert shortest_endings(["q", "a.q"], ["a"]) == {"q"}
    assert shortest_endings([], ["a"]) == set()


# ------------------------------------------------------------------------------------------ what matches nothing
@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"typo": 2, "head": 3}},
        {"alpha_pattern": {"typo": 2, "head": 3}},
        {"target_modules": ["up", "head", "typo"]},
        {"target_modules": ["typo"], "target_parameters": ["head.weight"]},
        {"target_parameters": ["typo.weight"]},
    ],
    ids=str,
)
def test_what_matches_nothing_beside_a_match_is_a_runtime_warning(options: dict[str, Any]) -> None:
    model = get_peft_model(stack(), config())
    if "target_parameters" not in options:
        with pytest.warns(RuntimeWarning, match="typo") as caught:
            model.add_adapter("other", config(**options))
        assert not any("'head'" in str(warning.message) for warning in caught)
    with pytest.warns(RuntimeWarning, match="typo"):
        get_peft_model(stack(), config(**options))


# ------------------------------------------------------------------------------------------ state dicts
def test_injection_by_a_state_dict_compares_it_with_the_config() -> None:
    full = get_peft_model_state_dict(inject_adapter_in_model(config(), stack()))
    part = {key: tensor for key, tensor in full.items() if "head" not in key}
    for targets, tensors in ((["up"], full), (["up", "head"], part)):
        with pytest.warns(RuntimeWarning, match="head") as caught:
            model = inject_adapter_in_model(config(target_modules=targets), stack(), state_dict=tensors)
        assert len(caught) == 1 and "layers" not in str(caught[0].message)
        assert get_peft_model_state_dict(model).keys() == tensors.keys()
    inject_adapter_in_model(config(), stack(), state_dict=full)


def test_an_embedding_is_looked_for_where_none_is_named() -> None:
    """Refused in `test_trainable_tokens`; here for methods that name nothing at all."""
    with refused(None, ValueError, "target_modules was left out"):
        get_peft_model(stack(), LoraConfig())
    with warned("layers_to_transform"):
        get_peft_model(stack(), config(target_modules=["up"], layers_to_transform=[0, 9]))
