# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters that become LoRA: exact where the rank suffices, told where not, with ties, saved modules and tokens."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, features, gpt2, llama, logits, randomise, refused, snapshot, stack, token_ids
from support.method_options import OPTIONS, layered_methods
from torch import nn

from peft import (
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PeftType,
    PromptTuningConfig,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.error import PeftKeyError, PeftTypeError, PeftValueError
from peft.utils.warning import PeftWarning


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Move everything that is trained, so that each adapter does something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval()


def converted(model: nn.Module, base: nn.Module, rank: Any, **options: Any) -> PeftModel:
    config, tensors = convert_to_lora(model, rank, **options)
    result = get_peft_model(base, config).eval()
    report = set_peft_model_state_dict(result, tensors)
    assert not report.unexpected_keys
    return result


CONVERTED = [
    m
    for m in layered_methods()
    if m
    in {
        "LORA",
        "LOHA",
        "LOKR",
        "VERA",
        "VBLORA",
        "RANDLORA",
        "C3A",
        "DELORA",
        "GRALORA",
        "MISS",
        "TINYLORA",
        "UNILORA",
        "FOURIERFT",
        "WAVEFT",
    }
]
REFUSED = {"IA3", "OFT", "BOFT", "HRA", "HIRA", "SHIRA"}


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("method", layered_methods())
def test_every_method_converts_exactly_or_is_refused(method: str) -> None:
    options = {"target_modules": ["0", "2"], **OPTIONS.get(method, {})}
    if method == "TRAINABLE_TOKENS":
        return
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**options)
    model = moved(get_peft_model(net(), config))
    x = features(width=16)
    if not model.supports_lora_conversion():
        assert method not in CONVERTED, "it has a delta"
        before = snapshot(model)
        with pytest.raises(PeftTypeError, match="cannot be converted|nothing to convert"):
            convert_to_lora(model, 4)
        assert snapshot(model) == before
        return
    assert method not in REFUSED
    expected, before = logits(model, x), snapshot(model)
    result = converted(model, net(), 16)
    assert snapshot(model) == before
    assert (expected - net()(x)).abs().max() > 1e-3
    assert_close(logits(result, x), expected, 1e-4)
    assert_close(logits(converted(model, net(), 1.0), x), expected, 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"2": 3}},
    ],
    ids=str,
)
def test_variants_of_lora_come_out_as_they_compute(options: dict) -> None:
    model = moved(get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"], **options)))
    x = features(width=16)
    expected = logits(model, x)
    with pytest.warns(PeftWarning, match="LoRA already"):
        result = converted(model, net(), 16)
    assert_close(logits(result, x), expected, 1e-4)


def test_an_adapter_that_is_invoked_stays_one() -> None:
    def alora() -> LoraConfig:
        return LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")

    model = moved(get_peft_model(llama(), alora()))
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 5]])
    expected = model(input_ids=ids).logits
    with pytest.warns(PeftWarning, match="LoRA already"):
        result = converted(model, llama(), 2)
    assert result.peft_config["default"].task_type == "CAUSAL_LM"
    assert_close(result(input_ids=ids).logits, expected, 1e-5)
    assert_close(result(input_ids=ids).logits[1], llama()(input_ids=ids).logits[1], 1e-5)


def test_the_smallest_rank_that_keeps_a_share() -> None:
    model = get_peft_model(net(), LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"]))
    layers = [model.base_model.model[0], model.base_model.model[2]]
    with torch.no_grad():  # squared singular values 9, 4, 1 and none at all
        layers[0].lora_A["default"].weight.copy_(torch.eye(3, 16))
        layers[0].lora_B["default"].weight.copy_(torch.eye(16, 3) * torch.tensor([3.0, 2.0, 1.0]))
    with pytest.warns(PeftWarning, match="LoRA already"):
        for share, rank in ((0.6, 1), (9 / 14 + 1e-3, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
            config, tensors = convert_to_lora(model, share)
            key = "base_model.model.0.lora_A.weight"
            assert tensors[key].shape == (rank, 16) and len(tensors) == 2
            assert list(config.exclude_modules) == ["2"]
            assert config.rank_pattern == config.alpha_pattern == ({} if rank == 1 else {"0": rank})
    assert config.r == config.lora_alpha == 1


def test_what_is_lost_is_told_once_and_only_then() -> None:
    model = moved(get_peft_model(net(), LoHaConfig(r=2, target_modules=["0", "2"])))
    with pytest.warns(PeftWarning, match="rank 1 does not hold.*2 of 2 weights.*relative error is 0[.]") as caught:
        convert_to_lora(model, 1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_lora(model, 4)
        convert_to_lora(model, 0.5)


def test_a_transposed_layer_and_compiled_arithmetic() -> None:
    model = moved(get_peft_model(gpt2(), VeraConfig(r=4, target_modules=["c_attn"])), 0.1)
    result = converted(model, gpt2(), 4, compile_kwargs={"backend": "eager"}, progressbar=False)
    ids = token_ids()
    assert_close(result(input_ids=ids).logits, model(input_ids=ids).logits, 1e-4)


@pytest.mark.parametrize("rank", [4, 1.0])
def test_tied_targets_stay_tied(rank: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = moved(get_peft_model(llama(tied=True), config))
    ids = token_ids()
    expected = model(input_ids=ids).logits
    with pytest.warns(PeftWarning, match="LoRA already"):
        save_as_lora(tmp_path, model, rank)
    result = PeftModel.from_pretrained(llama(tied=True), tmp_path).eval()
    assert_close(result(input_ids=ids).logits, expected, 1e-4)
    merged = result.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(merged(input_ids=ids).logits, expected, 1e-4)


def test_saved_modules_and_tokens_come_along(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 3]}
    )
    model = moved(get_peft_model(llama(), config))
    model.add_adapter("other", config)
    moved(model)  # of whose copies nothing must come along
    ids = token_ids()
    expected = model(input_ids=ids).logits
    with pytest.warns(PeftWarning, match="LoRA already"):
        save_as_lora(tmp_path / "a" / "b", model, 2)
    result = PeftModel.from_pretrained(llama(), tmp_path / "a" / "b").eval()
    assert_close(result(input_ids=ids).logits, expected, 1e-5)
    assert json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())["inference_mode"] is False


def test_merged_adapters_come_out_the_same() -> None:
    model = moved(get_peft_model(net(), LoHaConfig(r=2, target_modules=["0", "2"])))
    _, plain = convert_to_lora(model, 4)
    model.merge_adapter()
    _, merged = convert_to_lora(model, 4)
    for key, tensor in plain.items():
        assert_close(tensor, merged[key], 1e-6)
    dora = moved(get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], use_dora=True)))
    dora.merge_adapter()
    with pytest.warns(PeftWarning, match="LoRA already"), pytest.raises(PeftValueError, match="unmerge first"):
        convert_to_lora(dora, 4)


def test_layers_that_were_put_into_a_plain_model() -> None:
    base = net()
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"], init_weights=False), base)
    config, tensors = convert_to_lora(base, 4)
    other = inject_adapter_in_model(config, net())
    set_peft_model_state_dict(other, tensors)
    x = features(width=16)
    assert config.lora_alpha == config.r == 4
    assert_close(other(x), base(x), 1e-5)


def test_names_of_which_one_ends_like_the_other() -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("up", nn.Linear(8, 8))
        model.add_module("inner", nn.Sequential())
        model.inner.add_module("up", nn.Linear(8, 8))
        return model.eval()

    model = get_peft_model(nested(), LoraConfig(r=4, target_modules=["up"], rank_pattern={"inner.up": 2}))
    randomise(model)
    x = features()
    with pytest.warns(PeftWarning, match="LoRA already"):
        config, tensors = convert_to_lora(model, 0.999999)
    assert {config.rank_pattern["^up"], config.rank_pattern["inner.up"]} == {4, 2}
    result = get_peft_model(nested(), config).eval()
    set_peft_model_state_dict(result, tensors)
    assert_close(logits(result, x), logits(model.eval(), x), 1e-4)


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "at least 1"),
        (-2, "at least 1"),
        (0.0, "in (0, 1]"),
        (1.5, "in (0, 1]"),
        (True, "integer"),
        ("4", "integer"),
        (17, "larger than"),
    ],
)
def test_ranks_that_are_none(rank: Any, said: str) -> None:
    model = get_peft_model(net(), LoHaConfig(r=2, target_modules=["0"]))
    with refused(model, PeftValueError, said):
        convert_to_lora(model, rank)


def test_what_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoHaConfig(r=2, target_modules=["0"]))
    with pytest.raises(PeftKeyError, match="'nobody'"):
        convert_to_lora(model, 4, adapter_name="nobody")
    biased = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], bias="lora_only"))
    with pytest.raises(PeftValueError, match="bias='lora_only'"):
        convert_to_lora(biased, 4)
    pissa = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.raises(PeftValueError, match="path_initial_model_for_weight_conversion"):
        convert_to_lora(pissa, 4)
    kasa = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], kasa_config=KasaConfig()))
    with pytest.raises(PeftTypeError, match="cannot be converted"):
        convert_to_lora(kasa, 4)
    prompt = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not prompt.supports_lora_conversion()
    with pytest.raises(PeftTypeError, match="nothing to convert"):
        save_as_lora(tmp_path / "new", prompt, 4)
    assert not (tmp_path / "new").exists()


def test_shards_are_exact_at_their_size() -> None:
    model = moved(get_peft_model(net(), MissConfig(r=4, target_modules=["0"])))
    x = features(width=16)
    assert_close(logits(converted(model, net(), 4), x), logits(model, x), 1e-5)
    assert model.peft_config["default"].peft_type == PeftType.MISS


def test_half_precision_is_computed_in_float32() -> None:
    model = moved(
        get_peft_model(stack().bfloat16(), LoHaConfig(r=2, target_modules=["up"]), autocast_adapter_dtype=False)
    )
    _, tensors = convert_to_lora(model, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
