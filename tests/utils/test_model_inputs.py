# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Batch sizes, and masks of a sequence that virtual tokens have made longer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft.utils import _get_batch_size
from peft.utils.other import create_attention_mask


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval()


def mask_of(model, attention_mask):
    return create_attention_mask(
        model,
        model_input=None,
        attention_mask=attention_mask,
        past_key_values=None,
        cache_position=torch.arange(5),
        batch_size=2,
        sequence_length=5,
        position_ids=None,
    )


def test_the_model_computes_the_same_with_the_mask_that_was_made(model):
    ids, attention_mask = torch.arange(10).view(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    made = mask_of(model, attention_mask)
    assert made.shape == (2, 1, 5, 5)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=attention_mask).logits
        found = model(input_ids=ids, attention_mask=made).logits
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    assert torch.allclose(found[0, 2:], expected[0, 2:], atol=1e-6)
    assert mask_of(model, made) is made


def test_batch_size():
    assert _get_batch_size(torch.zeros(2, 3), None) == 2
    assert _get_batch_size(None, torch.zeros(4, 3, 1)) == 4
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        _get_batch_size(None, None)
