# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""MiCA: the directions that a weight hardly uses, and a factor that is never trained."""

from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, kinds, linears, llama, logits, refused, token_ids
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS = token_ids(vocabulary=12)


def config(targets: list[str] | None = None, init: str = "mica", **changes) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets or ["q_proj", "down_proj"], **changes}
    return LoraConfig(init_lora_weights=init, **settings)


def trained(model: nn.Module) -> set[str]:
    """Name the kinds of factors that are trained."""
    return {part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".") if "lora_" in part}


@pytest.mark.parametrize("target", ["lin", "conv", "head", "emb"])
def test_b_is_the_directions_of_the_smallest_singular_values(target: str) -> None:
    base = kinds()
    expected = logits(base, IDS)
    weight = base.get_submodule(target).weight.detach().clone()
    weight = weight.T if target in ("conv", "emb") else weight
    model = get_peft_model(base, config([target], fan_in_fan_out=target == "conv"))
    layer = base.get_submodule(target)
    a, b = layer.factor_weights("default")
    u = torch.linalg.svd(weight, full_matrices=False).U[:, -3:]
    assert_close((b * u).sum(0).abs().detach(), torch.ones(3), atol=1e-4)
    assert not a.any()
    assert_equal(logits(model, IDS), expected)
    assert trained(model) == {"lora_embedding_A" if target == "emb" else "lora_A"}


@pytest.mark.parametrize("widths", [(8, 12), (12, 8)])
def test_weights_of_less_than_full_rank(widths: tuple[int, int]) -> None:
    net = linears(*widths)
    with torch.no_grad():
        net[0].weight.copy_(torch.outer(torch.arange(float(widths[1])), torch.ones(widths[0])))
    get_peft_model(net, config(["0"]))
    b = net[0].lora_B["default"].weight.detach()
    assert_close(b.T @ b, torch.eye(3), atol=1e-5)
    assert_close(b.T @ net[0].weight.detach(), torch.zeros(3, widths[0]), atol=1e-4)


@pytest.mark.parametrize("init", ["mica", "MiCA"])
def test_b_is_never_trained(init: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(init=init))
    assert trained(model) == {"lora_A"}
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, expected in (("other", {"lora_A", "lora_B"}), ("default", {"lora_A"})):
        model.set_adapter(name)
        assert trained(model) == expected
    with model.disable_adapter():
        assert not trained(model)
    assert trained(model) == {"lora_A"}
    model.base_model.set_requires_grad("default", False)
    assert not trained(model)
    model.base_model.set_requires_grad(["default"], True)
    assert trained(model) == {"lora_A"}
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        assert trained(again) == {"lora_A"}


def test_another_adapter_of_the_same_name_is_trained_whole() -> None:
    model = get_peft_model(llama(), config())
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    assert trained(model) == {"lora_A", "lora_B"}


def test_an_adapter_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(again, token_ids()), logits(model, token_ids()))
    expected = logits(model, token_ids())
    assert_close(logits(model.merge_and_unload(), token_ids()), expected, atol=1e-4)


def test_a_tied_weight_gets_one_start() -> None:
    net = linears(8, 8, 8)
    net[1].weight = net[0].weight
    model = get_peft_model(net, config(["0", "1"], ensure_weight_tying=True))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1
    assert_equal(net[0].lora_B["default"].weight, net[1].lora_B["default"].weight)


def test_a_combination_is_trained_whole() -> None:
    """Its factor B is not what the start makes of the weight."""
    model = get_peft_model(llama(), config())
    model.add_weighted_adapter(["default"], [1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert trained(model) == {"lora_A", "lora_B"}


def test_refusals() -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.Conv1d(4, 4, 1), nn.MultiheadAttention(4, 1))
    with refused(net, ValueError, "'0'", "rank 3"):
        get_peft_model(net, config(["0"]))
    with refused(net, ValueError, "'1'", "Conv1d"):
        get_peft_model(net, config(["1"]))
    with refused(net, ValueError, "'2'", "MultiheadAttention"):
        get_peft_model(net, config(["2"]))
    with refused(net, ValueError, "mica", "one of the two"):
        get_peft_model(net, config(["0"], r=1, use_dora=True))
    with pytest.raises(ValueError, match="lora_bias"):
        config(["0"], lora_bias=True)
    low = nn.Sequential(nn.Linear(4, 4)).to(torch.float8_e4m3fn)
    with refused(None, TypeError, "'0'", "float8"):
        get_peft_model(low, config(["0"]))
