# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Prefix tuning of models whose layers have keys of different sizes, or use those of other layers."""

from pathlib import Path

import pytest
import torch
import transformers
from support.helpers import assert_close, warned
from torch import nn

from peft import PeftModel, PrefixTuningConfig, get_peft_model


pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Gemma4TextConfig"), reason="this version of transformers has no such model"
)
IDS = torch.arange(1, 6)[None]
USED = ("layers [0, 1]", "not into layers [2, 3]")


def gemma() -> nn.Module:
    """Heads of width 8 and 512 in turns; the last two layers use the keys and values of the first two."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=40,
        sliding_window=8,
    )
    return transformers.Gemma4ForCausalLM(config).eval()


def prefixed(**options: int) -> PeftModel:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    model = get_peft_model(gemma(), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    return model


def test_each_layer_gets_keys_of_its_size() -> None:
    model = prefixed()
    table = model.prompt_encoder["default"].embedding.weight.view(4, 8, 512)
    with warned(*USED):
        first, second = model.get_prompt(2).layers[:2]
    for kept, expected in (
        (first.keys, table[:, 0, :8]),
        (first.values, table[:, 1, :8]),
        (second.keys, table[:, 2]),
        (second.values, table[:, 3]),
    ):
        assert_close(kept, expected.expand(2, 1, *expected.shape))


def test_train_save_and_generate(tmp_path: Path) -> None:
    model = prefixed()
    with warned(*USED):
        model(IDS, labels=IDS).loss.backward()
    grad = model.prompt_encoder["default"].embedding.weight.grad.view(4, 4, -1)
    assert grad[:, :2].abs().sum() > 0 and not grad[:, 2:].any()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the prefix is put into"):
        expected = model(IDS).logits
        assert_close(PeftModel.from_pretrained(gemma(), tmp_path).eval()(IDS).logits, expected)
        last = model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False)[:, -1]
    assert last == expected[:, -1].argmax(-1)


@pytest.mark.parametrize("width", [4, 8])
def test_a_prefix_that_is_too_small(width: int) -> None:
    model = prefixed(token_dim=width, num_attention_heads=1)
    with pytest.raises(ValueError, match=rf"width {width}, which do not fit.*\(1, 8\), \(1, 512\)"):
        model(IDS)
