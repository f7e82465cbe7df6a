# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Caches of keys and values, under the name that a model knows them by."""

import pytest
import torch
from support.helpers import assert_close, llama
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils.caches import cache_parameter, given_cache


IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


class OlderNames(LlamaForCausalLM):
    """A model with code of its own, written for the names that were in use before transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{cache_parameter(LlamaForCausalLM): past_key_values},
        )


def make(cls, config):
    base = llama()
    base.__class__ = cls
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


CONFIGS = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "invoked": LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], init_lora_weights=False, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("cls", [LlamaForCausalLM, OlderNames])
@pytest.mark.parametrize("kind", CONFIGS)
def test_calls_continue_a_cache_by_any_name(kind, cls):
    model, expected = make(cls, CONFIGS[kind]), make(LlamaForCausalLM, CONFIGS[kind])(IDS).logits
    own_name = cache_parameter(model.get_base_model())
    for name in {own_name, "past_key_values"}:
        first = model(IDS[:, :4], use_cache=True)
        rest = model(IDS[:, 4:], **{name: given_cache(first)})
        assert_close(rest.logits, expected[:, -2:])


def test_a_new_cache_is_filled():
    model, cache = make(OlderNames, CONFIGS["prefix"]), DynamicCache()
    model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 3 + IDS.shape[1]


def test_a_model_without_a_cache_takes_none():
    assert cache_parameter(nn.Linear(2, 2)) is None
    assert given_cache({"input_ids": IDS}) is None
