# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Finding tied groups: by identity of parameters, under any name, on any device, with and without adapters."""

import pytest
from accelerate.utils.modeling import find_tied_parameters
from support.tied_models import TIED_MODELS, llama
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tying.groups import find_tied_groups


@pytest.mark.parametrize("name", TIED_MODELS)
def test_group_is_found_and_owned_by_the_input_side(name):
    tied = TIED_MODELS[name]
    groups = find_tied_groups(tied.build())
    assert tied.members in [group.members for group in groups]
    assert groups[0].owner.rpartition(".")[0].endswith(tied.inputs)


@pytest.mark.parametrize("name", TIED_MODELS)
def test_groups_agree_with_accelerate(name):
    """Another library's search gives the same places; it is a cross-check, not the source."""
    model = TIED_MODELS[name].build()
    ours = sorted(sorted(group.members) for group in find_tied_groups(model))
    assert ours == sorted(sorted(names) for names in find_tied_parameters(model))


@pytest.mark.parametrize("name", TIED_MODELS)
def test_adapters_do_not_change_what_is_found(name):
    tied = TIED_MODELS[name]
    model = tied.build()
    before = [group.members for group in find_tied_groups(model)]
    get_peft_model(model, LoraConfig(target_modules=tied.targets))
    assert [group.members for group in find_tied_groups(model)] == before


def test_separate_tensors_are_no_tie_whatever_the_config_says():
    model = llama(tie=False)
    model.config.tie_word_embeddings = True
    assert find_tied_groups(model) == []


def test_shared_tensors_are_a_tie_whatever_the_config_says():
    model = llama()
    model.config.tie_word_embeddings = False
    assert len(find_tied_groups(model)) == 1


def test_equal_values_are_no_tie():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].load_state_dict(net[0].state_dict())
    assert find_tied_groups(net) == []


def test_one_module_under_two_names_is_one_place():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    assert find_tied_groups(net) == []


def test_found_on_the_meta_device_without_storage():
    model = llama().to("meta")
    model.tie_weights()
    assert model.lm_head.weight.is_meta
    assert [group.members for group in find_tied_groups(model)] == [TIED_MODELS["llama"].members]


def test_group_is_a_value():
    first, second = (find_tied_groups(llama())[0] for _ in range(2))
    assert first == second
    assert first.parameter is not second.parameter
    assert first.followers == ("lm_head.weight",)
