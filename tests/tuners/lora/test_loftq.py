# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoftQ: weights that are rounded by the real bitsandbytes, and factors that make up for it."""

from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, gpt2, linears, llama, logits, refused, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.utils.loftq_utils import loftq_init


bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

WIDTH = 64


def config(targets: list[str], bits: int = 4, steps: int = 1, **changes) -> LoraConfig:
    loftq = LoftQConfig(loftq_bits=bits, loftq_iter=steps)
    settings = {"r": 8, "lora_alpha": 16, "init_lora_weights": "loftq", "loftq_config": loftq, **changes}
    return LoraConfig(target_modules=targets, **settings)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round by the layers of bitsandbytes, instead of by its functions."""
    rows, columns = weight.shape
    if bits == 4:
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compress_statistics=False, quant_type="nf4")
        layer.load_state_dict({"weight": weight})
        quantised = layer.to("cpu").weight
        return bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state).float()
    scales = weight.half().abs().amax(1, keepdim=True).float() / 127
    return (weight.half().float() / scales).round() * scales


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_and_factors_are_fitted_in_turns(bits: int, steps: int) -> None:
    net = linears(WIDTH, 2 * WIDTH)
    before = net[0].weight.detach().clone()
    left = before
    for _ in range(steps):
        quantised = rounded(left, bits)
        u, s, vh = torch.linalg.svd(before - quantised, full_matrices=False)
        product = u[:, :8] * s[:8] @ vh[:8]
        left = before - product
    get_peft_model(net, config(["0"], bits, steps))
    layer = net[0]
    atol = 1e-5 if bits == 4 else 2e-3  # values between two integers may go to either
    assert_close(layer.weight, quantised, atol=atol)
    assert_close(layer.get_delta_weight("default"), product, atol=atol)


def test_the_adapted_layer_is_nearer_to_the_original_whatever_the_scaling() -> None:
    for alpha in (4, 8, 32):
        net = linears(WIDTH, WIDTH)
        before = net[0].weight.detach().clone()
        get_peft_model(net, config(["0"], lora_alpha=alpha))
        layer = net[0]
        lost = (before - layer.weight).norm()
        assert (before - layer.weight - layer.get_delta_weight("default")).norm() < 0.9 * lost


def test_transposed_layers_and_types() -> None:
    net = gpt2()
    expected = logits(net, token_ids())
    model = get_peft_model(net, config(["c_attn", "c_proj"], bits=8, r=4, fan_in_fan_out=True))
    assert_close(logits(model, token_ids()), expected, atol=0.1)
    half = linears(WIDTH, WIDTH).bfloat16()
    parameter = half[0].weight
    get_peft_model(half, config(["0"]))
    assert half[0].weight is parameter
    assert half[0].lora_A["default"].weight.dtype == torch.float32


def test_a_tied_weight_is_rounded_once() -> None:
    net = linears(WIDTH, WIDTH, WIDTH)
    net[1].weight = net[0].weight
    before = net[0].weight.detach().clone()
    get_peft_model(net, config(["0", "1"], ensure_weight_tying=True))
    assert_close(net[0].weight, rounded(before, 4))
    assert net[0].weight is net[1].weight


def test_a_saved_adapter_is_loaded(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(["q_proj", "down_proj"], steps=2, r=4))
    assert model.peft_config["default"].loftq_config == {"loftq_bits": 4, "loftq_iter": 2}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(again, token_ids()), logits(model, token_ids()))
    with refused(model, ValueError, "'loftq'", "plain LoRA"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path))


def test_the_function_of_the_release() -> None:
    weight = linears(WIDTH, WIDTH)[0].weight
    quantised, a, b = loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=2)
    assert (weight - quantised - b @ a).norm() < (weight - rounded(weight.detach(), 4)).norm()
    with refused(None, ValueError, "num_bits"):
        loftq_init(weight, 3, 8)


@pytest.mark.parametrize("settings", [{"bits": 3}, {"steps": 0}])
def test_settings_are_refused(settings: dict) -> None:
    net = linears(WIDTH, WIDTH)
    with refused(net, ValueError, "loftq_bits", "loftq_iter"):
        get_peft_model(net, config(["0"], **settings))


def test_layers_are_refused() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    with refused(net, ValueError, "'0'", "Conv1d"):
        get_peft_model(net, config(["0", "1"], r=2))
    quantised = nn.Sequential(bnb.nn.Linear4bit(WIDTH, WIDTH).to("cpu"))
    with refused(None, TypeError, "'0'", "quantised"):
        get_peft_model(quantised, config(["0"]))


# ------------------------------------------------------------------------------------------ models that are quantised
def quantised_llama(folder: Path) -> nn.Module:
    llama(hidden_size=WIDTH, intermediate_size=WIDTH).save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).eval()


def adapted(folder: Path) -> PeftModel:
    return get_peft_model(quantised_llama(folder), LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize("given", ["folder", "file", "nothing", "shards"])
def test_factors_make_up_for_what_is_lost(given: str, tmp_path: Path) -> None:
    model = adapted(tmp_path)
    original = llama(hidden_size=WIDTH, intermediate_size=WIDTH)
    if given == "shards":
        (tmp_path / "model.safetensors").unlink()
        original.save_pretrained(tmp_path, max_shard_size="40KB")
    path = {"folder": tmp_path, "file": tmp_path / "model.safetensors", "shards": str(tmp_path)}.get(given)
    before = (logits(model, token_ids()) - logits(original, token_ids())).norm()
    replace_lora_weights_loftq(model, path)
    assert (logits(model, token_ids()) - logits(original, token_ids())).norm() < before
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    loss = original.get_submodule(name).weight - layer.get_base_weight().float()
    u, s, vh = torch.linalg.svd(loss, full_matrices=False)
    assert_close(layer.get_delta_weight("default"), u[:, :8] * s[:8] @ vh[:8])


def test_a_callback_decides_about_each_layer(tmp_path: Path) -> None:
    model, names = adapted(tmp_path), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name}

    def keep(called: nn.Module, name: str) -> bool:
        assert called is model
        names.append(name)
        return name.endswith("q_proj")

    replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert names[0] == "model.layers.0.self_attn.q_proj"
    for name, parameter in model.named_parameters():
        if name in before and "down_proj" in name:
            assert_equal(parameter, before[name])
        elif name in before:
            assert not torch.equal(parameter, before[name])


def test_replacing_is_refused(tmp_path: Path) -> None:
    model = adapted(tmp_path / "model")
    with refused(None, ValueError, "4 bits"):
        replace_lora_weights_loftq(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    with refused(None, ValueError, "'other'"):
        replace_lora_weights_loftq(model, adapter_name="other")
    with refused(None, ValueError, "model_path"):
        replace_lora_weights_loftq(model, tmp_path / "nothing")
    with refused(None, TypeError, "base_model.model."):
        replace_lora_weights_loftq(model.get_base_model(), tmp_path / "model")
    llama(hidden_size=32, intermediate_size=WIDTH).save_pretrained(tmp_path / "other")
    with refused(None, ValueError, "(32, 32)", "another model"):
        replace_lora_weights_loftq(model, tmp_path / "other")
    gpt2().save_pretrained(tmp_path / "gpt2")
    with refused(None, ValueError, "q_proj.weight", "another model"):
        replace_lora_weights_loftq(model, tmp_path / "gpt2")
