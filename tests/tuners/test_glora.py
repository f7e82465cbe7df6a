# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GLoRA against its formula for all forms of parts, its starts, and parts that are not there."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import GloraConfig, PeftModel, get_peft_model
from peft.tuners.glora.layer import GloraLayer


FORMS = list(itertools.product(("lora", "vector", "constant", "none"), ("lora", "none"), ("vector", "constant")))
FORMS += [("lora", "vector", "none"), ("none", "none", "none")]


def adapted(net: nn.Sequential, **fields: object) -> GloraLayer:
    get_peft_model(net, GloraConfig(**{"target_modules": ["0"], "r": 2, "init_weights": False, **fields}))
    return net[0]


def parts(layer: GloraLayer, adapter: str = "default") -> tuple[torch.Tensor, ...]:
    """Multiply out the five parts of an adapter, in full."""
    out, inputs = layer.out_features, layer.in_features
    sizes = (out, inputs), (out, inputs), (inputs, 1), (out,), (out,)
    found = []
    for name, size in zip("ABCDE", sizes, strict=True):
        tensors = dict(layer._modules[f"glora_{name}"][adapter].named_parameters())
        part = tensors["Xd"] @ tensors["Xu"] if "Xd" in tensors else tensors.get("X", torch.zeros(1))
        found.append(part.expand(size).detach())
    return tuple(found)


@pytest.mark.parametrize(("a_b", "c", "d_e"), FORMS)
def test_weight_and_bias_are_scaled_and_shifted(a_b: str, c: str, d_e: str) -> None:
    layer, x = adapted(nn.Sequential(nn.Linear(6, 4)), config_A_B=a_b, config_C=c, config_D_E=d_e), torch.randn(3, 6)
    base, (A, B, C, D, E) = layer.base_layer, parts(layer)  # noqa: N806
    w, b = base.weight.detach().clone(), base.bias.detach().clone()
    weight, bias = w * (1 + A) + B, b * (1 + D) + E + (w @ C).squeeze(1)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    layer.merge()
    torch.testing.assert_close(base.weight, weight)
    torch.testing.assert_close(base.bias, bias)
    layer.unmerge()
    assert torch.equal(base.weight, w) and torch.equal(base.bias, b)


@pytest.mark.parametrize("in_stages", [True, False])
def test_adapters_add_up_from_the_same_weight_and_bias(in_stages: bool) -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    layer = adapted(net)
    layer.update_layer("other", GloraConfig(r=2, init_weights=False, config_D_E="vector"))
    base = layer.base_layer
    w, b = base.weight.detach().clone(), base.bias.detach().clone()
    weight, bias = w.clone(), b.clone()
    for name in ("default", "other"):
        A, B, C, D, E = parts(layer, name)  # noqa: N806
        weight, bias = weight + w * A + B, bias + b * D + E + (w @ C).squeeze(1)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    for names in (["default"], ["other"]) if in_stages else (["default", "other"],):
        layer.merge(adapter_names=names)
    torch.testing.assert_close(base.weight, weight)
    torch.testing.assert_close(base.bias, bias)
    layer.unmerge(["default"])
    assert layer.merged_adapters == ["other"]
    layer.unmerge()
    assert torch.equal(base.weight, w) and torch.equal(base.bias, b)


def test_both_are_merged_for_good() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    config = GloraConfig(target_modules=["0"], r=2, init_weights=False)
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


def test_parts_that_are_not_there_take_no_room_but_in_files(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(6, 4, bias=False)), torch.randn(3, 6)
    layer = adapted(net, config_A_B="vector")
    assert [layer._modules[f"glora_{name}"]["default"].zeros.numel() for name in "CDE"] == [1, 1, 1]
    base = nn.Sequential(layer.base_layer)
    model = get_peft_model(base, GloraConfig(target_modules=["0"], config_A_B="none"))
    expected = model(x)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("glora_")[2]: tuple(tensor.shape) for key, tensor in saved.items()} == {
        "A.zeros": (4, 6),
        "B.zeros": (4, 6),
        "C.zeros": (6, 1),
        "D.zeros": (4,),
        "E.zeros": (4,),
    }
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("start", [True, False])
def test_starts(start: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    torch.manual_seed(0)
    layer = adapted(net, init_weights=start, config_C="vector")
    torch.manual_seed(0)
    bounds = {"A": 6, "B": 6}
    for name, inputs in bounds.items():
        part = layer._modules[f"glora_{name}"]["default"]
        assert torch.equal(part.Xu, torch.empty(2, 6).uniform_(-(inputs**-0.5), inputs**-0.5))
        expected = torch.zeros(4, 2) if start else torch.empty(4, 2).uniform_(-(2**-0.5), 2**-0.5)
        assert torch.equal(part.Xd, expected)
    others = [layer._modules[f"glora_{name}"]["default"].X for name in "CDE"]
    expected = [torch.empty(6, 1).uniform_(-1, 1), torch.empty(1).normal_(std=0.02), torch.empty(1).normal_(std=0.02)]
    for tensor, drawn in zip(others, expected, strict=True):
        assert torch.equal(tensor, torch.zeros_like(drawn) if start else drawn)


@pytest.mark.parametrize("fields", [{"config_A_B": "other"}, {"config_C": "constant"}, {"config_D_E": "lora"}])
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GloraConfig(**fields)
