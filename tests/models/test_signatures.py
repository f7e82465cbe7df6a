# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Signatures of a base model that a wrapper shows."""

import copy
import inspect
import pickle

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    llama,
    logits,
    randomise,
    refused,
    token_ids,
)
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.helpers import update_forward_signature, update_generate_signature, update_signature


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def test_a_model_shows_what_its_base_takes() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2)).eval()
    base = model.get_base_model()
    randomise(model)
    expected = logits(model, token_ids())
    assert "input_ids" not in inspect.signature(model.forward).parameters
    update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert_equal(logits(model, input_ids=token_ids()), expected)
    assert model.generate(input_ids=token_ids(), max_new_tokens=2).shape == (2, 7)
    names = ["default", "__base__"]
    with model.disable_adapter():
        plain = logits(model, token_ids())
    assert_close(logits(model, input_ids=token_ids(), adapter_names=names)[1], plain[1])


def test_signatures_of_tasks_stay() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    before = inspect.signature(model.forward)
    update_forward_signature(model)
    assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_call_their_own_method(copied) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    update_forward_signature(model)
    twin = copied(model)
    assert twin.forward.__self__ is twin
    update_generate_signature(twin)  # its base has none
    assert_equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_other_methods_have_no_signature_to_show() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2))
    with refused(model, ValueError, "backward", "forward", "generate"):
        update_signature(model, "backward")
