# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GraLoRA against its blocks, one after the other."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import GraloraConfig, get_peft_model
from peft.tuners.gralora.layer import GraloraLayer


def adapted(base: nn.Module, **fields: object) -> GraloraLayer:
    net = nn.Sequential(base)
    get_peft_model(net, GraloraConfig(**{"target_modules": ["0"], "r": 4, "init_weights": False, **fields}))
    return net[0]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("base", [nn.Linear(12, 8), Conv1D(8, 12)])
def test_delta_block_by_block(base: nn.Module, k: int, hybrid_r: int) -> None:
    layer = adapted(base, gralora_k=k, hybrid_r=hybrid_r, alpha=6)
    a, b = layer.gralora_A["default"], layer.gralora_B["default"]
    delta, q = torch.zeros(8, 12), 4 // k
    for j in range(k):
        for i in range(k):
            block = b[j, i * q : (i + 1) * q].T @ a[i, :, j * q : (j + 1) * q].T
            delta[j * 8 // k : (j + 1) * 8 // k, i * 12 // k : (i + 1) * 12 // k] = block.detach()
    if hybrid_r:
        delta += (layer.gralora_B_general["default"].weight @ layer.gralora_A_general["default"].weight).detach()
    delta *= 6 / (4 + hybrid_r)
    merged = layer.get_delta_weight("default")
    torch.testing.assert_close(merged.T if isinstance(base, Conv1D) else merged, delta)
    for shape in ((12,), (3, 12), (2, 3, 5, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.T, atol=1e-5, rtol=1e-5)


def test_draws_are_those_of_the_blocks_in_turn() -> None:
    base = nn.Linear(12, 8)
    torch.manual_seed(0)
    layer = adapted(base, gralora_k=2)
    torch.manual_seed(0)
    for block_a, block_b in zip(layer.gralora_A["default"], layer.gralora_B["default"], strict=True):
        assert torch.equal(block_a, torch.empty(4, 6).uniform_(-(6**-0.5), 6**-0.5).T)
        assert torch.equal(block_b, torch.empty(4, 4).uniform_(-0.5, 0.5).T)


@pytest.mark.parametrize("fields", [{"gralora_k": 0}, {"r": 3, "gralora_k": 2}])
def test_refused_by_the_config(fields: dict) -> None:
    with pytest.raises(ValueError, match="gralora_k"):
        GraloraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "name"), [({"gralora_k": 8, "r": 8}, "gralora_k"), ({"r": 0}, "r must"), ({"hybrid_r": -1}, "hybrid_r")]
)
def test_refused_by_the_layer(fields: dict, name: str) -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(ValueError, match=name):
        get_peft_model(net, GraloraConfig(target_modules=["0"], **fields))
    assert type(net[0]) is nn.Linear
