# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""QA-LoRA: its formula on groups of inputs, its start, files of plain factors, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, features, logits, randomise, refused, stack
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["up"], "use_qalora": True, "qalora_group_size": 4, **changes}
    )


def test_the_formula() -> None:
    net = nn.Sequential(nn.Linear(12, 5))
    get_peft_model(net, config(target_modules=["0"]))
    randomise(net)
    layer, x = net[0], features(6, 12).view(2, 3, 12)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 3) and b.shape == (5, 2)
    pooled = torch.stack([3 * x[..., 4 * j : 4 * j + 4].mean(-1) for j in range(3)], -1)
    assert_close(layer(x), layer.base_layer(x) + 3 * pooled @ a.T @ b.T)
    delta = layer.get_delta_weight("default")
    assert_close(delta, 3 * 3 / 4 * b @ torch.stack([a[:, i // 4] for i in range(12)], 1))
    # which is what zero points of groups can take in
    assert_equal(delta.view(5, 3, 4), delta.view(5, 3, 4)[..., :1].expand(5, 3, 4))
    assert layer.qalora_group_size == {"default": 4}


def test_the_start() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 5))
    get_peft_model(net, config(target_modules=["0"], init_lora_weights=False))
    a, bound = net[0].lora_A["default"].weight, (4 / 64) ** 0.5
    assert 0.8 * bound < a.abs().max() <= bound and net[0].lora_B["default"].weight.any()
    model = get_peft_model(stack(), config())
    assert_equal(logits(model, features()), logits(stack(), features()))


def test_files_with_plain_factors_are_plain_lora(tmp_path: Path) -> None:
    plain = get_peft_model(stack(), config(use_qalora=False, target_modules=["up", "head"]))
    randomise(plain)
    plain.peft_config["default"].use_qalora = True  # as the release writes it for layers that are not GPTQ's
    plain.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=True).eval()
    assert_equal(logits(model, features()), logits(plain.eval(), features()))
    head = model.base_model.model.head
    assert head.variants == {} and head.lora_A["default"].weight.requires_grad
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(stack(), tmp_path / "again", low_cpu_mem_usage=True).eval()
    assert_equal(logits(again, features()), logits(model, features()))
    again.merge_adapter()
    assert_close(logits(again, features()), logits(model, features()))


def test_files_of_another_group_size_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(stack(), config(qalora_group_size=2))
    randomise(model)
    model.save_pretrained(tmp_path)
    assert differs(logits(model, features()), logits(stack(), features()))
    with pytest.raises(RuntimeError, match="lora_A"):
        PeftModel.from_pretrained(stack(), tmp_path, config=config(qalora_group_size=4))


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"qalora_group_size": 3}, "qalora_group_size=3 does not divide the 8 inputs"),
        ({"qalora_group_size": 0}, "qalora_group_size=0 does not divide"),
        ({"init_lora_weights": "olora"}, "use True, False or 'gaussian'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], mention: str) -> None:
    net = stack()
    with refused(net, ValueError, mention):
        get_peft_model(net, config(**changes))
