# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The same seed gives the start that release 0.21.2 gives, for every method that draws at random."""

import json

import pytest
import torch
from golden.starts import FACTS, Net, cases, start

from peft import LoraConfig, PeftConfig, get_peft_model


pytestmark = pytest.mark.filterwarnings("ignore::peft.PeftWarning")
RECORDED = json.loads(FACTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "config", "dtype"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_start_of_the_release(name: str, config: PeftConfig, dtype: torch.dtype) -> None:
    found = start(config, dtype)
    assert set(found) == set(RECORDED[name])
    for tensor, values in found.items():
        assert values == pytest.approx(RECORDED[name][tensor], rel=1e-4, abs=1e-5), tensor


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_factors_are_drawn_as_layers_of_torch_and_then_anew(init: bool | str) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    torch.manual_seed(0)
    layer = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)).base_model.model[0]
    after = torch.rand(3)
    torch.manual_seed(0)
    a, b = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 5, bias=False)
    if init is True:
        a = torch.nn.Linear(6, 4, bias=False)
    elif init == "gaussian":
        torch.nn.init.normal_(a.weight, std=1 / 4)
    assert torch.equal(layer.lora_A["default"].weight, a.weight)
    assert torch.equal(layer.lora_B["default"].weight, b.weight * (init is False))
    assert torch.equal(after, torch.rand(3))


def test_without_storage_nothing_is_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    net = Net()
    torch.manual_seed(0)
    get_peft_model(net, LoraConfig(target_modules=["one", "emb", "conv2d"]), low_cpu_mem_usage=True)
    assert torch.equal(torch.rand(3), expected)
