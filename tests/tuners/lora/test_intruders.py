# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Intruder dimensions, which fine-tuning has put among the leading singular vectors of a weight."""

from typing import Any

import pytest
import torch
from support.helpers import assert_close, assert_equal, gpt2, llama, refused, token_ids
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.error import PeftKeyError, PeftValueError


def with_intruder(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    """Make an adapter that puts a large, new direction into a weight whose outputs lie in four others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False))
    with torch.no_grad():
        net[0].weight[4:] = 0
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **options)).eval()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight[6, 0] = 5.0
        model.base_model.model[0].lora_B["default"].weight[1, 1] = 0.3
    return model


def by_hand(weight: torch.Tensor, change: torch.Tensor, top_k: int, threshold: float, factor: float) -> torch.Tensor:
    """Take the share of intruders out, one after the other."""
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    u, s, v = torch.linalg.svd(weight + change, full_matrices=False)
    for i in range(min(top_k, len(s))):
        if max(abs(u[:, i] @ known[:, j]) for j in range(known.shape[1])) < threshold:
            change = change - (1 - factor) * s[i] * torch.outer(u[:, i], v[i])
    return change


@pytest.mark.parametrize("factor", [0.0, 0.75, 1.0])
def test_against_the_paper(factor: float) -> None:
    model, lines = with_intruder(), []
    layer = model.base_model.model[0]
    weight, change = layer.weight.clone(), layer.get_delta_weight("default").clone()
    reduce_intruder_dimension(model, mitigation_lambda=factor, logging_sink=lines.append)
    expected = by_hand(weight, change, 10, 0.5, factor)
    u, s, v = torch.linalg.svd(expected)
    best = (u[:, :2] * s[:2]) @ v[:2]
    assert_close(layer.get_delta_weight("intruder_reduced"), best, 1e-5)
    assert_equal(layer.get_delta_weight("default"), change)
    assert (factor == 1) == torch.allclose(best, change, atol=1e-4)
    assert model.active_adapters == ["intruder_reduced"] and len(lines) == 2
    assert "base_model.model.0: 1 intruder" in lines[0] and "intruder_reduced" in lines[1]
    assert model.peft_config["default"] is not model.peft_config["intruder_reduced"]


def test_without_intruders_the_factors_are_copied(capsys: pytest.CaptureFixture) -> None:
    model = with_intruder()
    reduce_intruder_dimension(model, threshold_epsilon=0.0, new_adapter_name="same")
    layer = model.base_model.model[0]
    for factors in (layer.lora_A, layer.lora_B):
        assert_equal(factors["same"].weight, factors["default"].weight)
    assert "No intruders" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_saved_modules_and_tokens(tied: bool) -> None:
    config = LoraConfig(
        r=2, target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=tied, modules_to_save=["norm"]
    )
    model = get_peft_model(llama(tied=tied), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    expected = model(input_ids=token_ids()).logits
    reduce_intruder_dimension(model, mitigation_lambda=1.0, logging_sink=None)
    assert_close(model(input_ids=token_ids()).logits, expected, 1e-3)
    reduce_intruder_dimension(model, new_adapter_name="less", mitigation_lambda=0.0, logging_sink=None)
    assert (model(input_ids=token_ids()).logits - expected).abs().max() > 1e-3


def test_weights_that_are_stored_transposed() -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)).eval()
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    expected = by_hand(layer.weight.T.detach(), layer.get_delta_weight("default").T.detach(), 10, 0.9, 0.0)
    reduce_intruder_dimension(model, threshold_epsilon=0.9, mitigation_lambda=0.0, logging_sink=None)
    u, s, v = torch.linalg.svd(expected, full_matrices=False)
    assert_close(layer.get_delta_weight("intruder_reduced").T, (u[:, :2] * s[:2]) @ v[:2], 1e-4)
    assert model(input_ids=token_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k"),
        ({"threshold_epsilon": 2.0}, "threshold_epsilon"),
        ({"mitigation_lambda": -1}, "lambda"),
        ({"new_adapter_name": "default"}, "already"),
    ],
)
def test_arguments_that_are_refused(options: dict, said: str) -> None:
    model = with_intruder()
    with refused(model, PeftValueError, said):
        reduce_intruder_dimension(model, **options)


def test_models_that_are_refused() -> None:
    loha = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(r=2, target_modules=["0"]))
    with refused(loha, PeftValueError, "only LoRA's"):
        reduce_intruder_dimension(loha)
    with refused(with_intruder(), PeftKeyError, "'nobody'"):
        reduce_intruder_dimension(with_intruder(), "nobody")
    dora = with_intruder(use_dora=True)
    with refused(dora, PeftValueError, "save_as_lora"):
        reduce_intruder_dimension(dora)
    merged = with_intruder()
    merged.merge_adapter()
    with pytest.raises(PeftValueError, match="unmerge"):
        reduce_intruder_dimension(merged)
    convolution = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with refused(convolution, PeftValueError, "3 dimensions"):
        reduce_intruder_dimension(convolution)
