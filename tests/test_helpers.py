# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The helpers around models with adapters: scaling, types, files, kept norms."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    kinds,
    llama,
    logits,
    randomise,
    refused,
    token_ids,
)
from torch import nn

from peft import LoraConfig, get_peft_model, shift_tokens_right
from peft.helpers import (
    DoraCaching,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
)
from peft.tuners.lora import dora


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS = token_ids(vocabulary=12)
TARGETS = ["emb", "conv", "lin", "head"]


def adapted() -> nn.Module:
    model = get_peft_model(kinds(), LoraConfig(r=2, target_modules=TARGETS))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=1, target_modules=["lin"]))
    randomise(model)
    return model


# ------------------------------------------------------------------------------------------ scaling
def test_rescaling_after_a_forward_pass() -> None:
    """However a layer is computed, it does not hold on to the numbers that it was computed with before."""
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    before, base = model(x), net[0].base_layer(x)
    with rescale_adapter_scale(model, 0.25):
        assert_close(model(x), base + 0.25 * (before - base))
    assert_equal(model(x), before)


@pytest.mark.parametrize("multiplier", [0.25, 2, 0, -1.0])
def test_rescaling_for_a_while(multiplier: float) -> None:
    model, by_hand = adapted(), adapted()
    before = logits(model, IDS)
    for name in TARGETS:
        layer = by_hand.get_base_model().get_submodule(name)
        layer.set_scale("default", multiplier)
        layer.set_scale("other", multiplier)
    with rescale_adapter_scale(model, multiplier):
        assert_close(logits(model, IDS), logits(by_hand, IDS))
        assert model.get_base_model().lin.scaling["other"] == 0.5 * multiplier
    assert_equal(logits(model, IDS), before)
    assert model.get_base_model().lin.scaling == {"default": 4.0, "other": 0.5}


def test_scaling_comes_back_after_an_exception_and_a_deletion() -> None:
    model = adapted()
    with pytest.raises(KeyError), rescale_adapter_scale(model, 3.0):
        raise KeyError
    assert model.get_base_model().lin.scaling["default"] == 4.0
    with rescale_adapter_scale(model, 3.0):
        model.delete_adapter("other")
    assert model.get_base_model().lin.scaling == {"default": 4.0}


def test_a_table_of_scalings_that_somebody_has_looked_at_keeps_its_numbers() -> None:
    layer = (model := adapted()).get_base_model().lin
    before = layer.scaling
    with rescale_adapter_scale(model, 0.5):
        assert before == {"default": 4.0, "other": 0.5} and layer.scaling == {"default": 2.0, "other": 0.25}
        model.add_adapter("new", LoraConfig(r=2, target_modules=["lin"]))
    assert layer.scaling == {"default": 4.0, "other": 0.5, "new": 4.0}


def test_tied_layers_are_scaled_once() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config)
    head = model.get_base_model().lm_head
    with rescale_adapter_scale(model, 0.5):
        assert head.scaling["default"] == 2.0
    assert head.scaling["default"] == 4.0


@pytest.mark.parametrize("multiplier", ["a", None, [1.0]])
def test_a_multiplier_is_a_number(multiplier) -> None:
    model = adapted()
    with refused(model, TypeError, "multiplier", type(multiplier).__name__), rescale_adapter_scale(model, multiplier):
        pass


def test_rescaling_needs_lora() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with refused(net, ValueError, "no LoRA layer"), rescale_adapter_scale(net, 2.0):
        pass


# ------------------------------------------------------------------------------------------ types
def test_inputs_are_not_cast_for_a_while() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    model(x)
    with disable_input_dtype_casting(model, active=False):
        model(x)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError):
        model(x)  # bfloat16 meets float32
    model(x)


# ------------------------------------------------------------------------------------------ files
def test_finding_adapters(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    assert check_if_peft_model(tmp_path / "adapter")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    assert not check_if_peft_model(tmp_path / "empty")
    assert not check_if_peft_model(tmp_path / "broken")


# ------------------------------------------------------------------------------------------ norms of DoRA
@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each norm that is computed."""
    computed: list[int] = []
    compute = dora.weight_norm
    monkeypatch.setattr(dora, "weight_norm", lambda *args, **kwargs: computed.append(1) or compute(*args, **kwargs))
    return computed


def dora_model() -> nn.Module:
    model = get_peft_model(kinds(), LoraConfig(r=2, target_modules=["lin"], use_dora=True)).eval()
    randomise(model)
    return model


@pytest.mark.parametrize(
    ("context", "expected"), [(nullcontext(), 3), (DoraCaching(), 1), (DoraCaching(enabled=False), 3)]
)
def test_norms_are_kept_where_that_is_asked_for(context, expected: int, norms: list[int]) -> None:
    model = dora_model()
    first = logits(model, IDS)
    norms.clear()
    with torch.no_grad():
        model.get_base_model().lin.lora_A["default"].weight.mul_(1)
    with context:
        for _ in range(3):
            assert_equal(logits(model, IDS), first)
    assert len(norms) == expected


def test_a_kept_norm_is_never_out_of_date(norms: list[int]) -> None:
    model = dora_model()
    layer = model.get_base_model().lin
    changes = (
        lambda: layer.lora_B["default"].weight.mul_(2),
        lambda: layer.base_layer.weight.add_(1),
        lambda: layer.set_scale("default", 3.0),
        lambda: model.load_state_dict({key: value + 0.5 for key, value in model.state_dict().items()}),
    )
    with DoraCaching(), torch.no_grad():
        for change in changes:
            before = logits(model, IDS)
            change()
            after = logits(model, IDS)
            with DoraCaching(enabled=False):
                assert_equal(logits(model, IDS), after)
            assert differs(before, after)


def test_caching_goes_back_to_what_it_was() -> None:
    caching = DoraCaching()
    with pytest.raises(KeyError), caching, DoraCaching(enabled=False), caching:
        assert dora.ENABLE_DORA_CACHING
        raise KeyError
    assert not dora.ENABLE_DORA_CACHING
    caching()
    assert dora.ENABLE_DORA_CACHING
    caching(enabled=False)
    assert not dora.ENABLE_DORA_CACHING


def test_shift_tokens_right() -> None:
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    before = labels.clone()
    assert torch.equal(shift_tokens_right(labels, 0, 1), torch.tensor([[1, 5, 6], [1, 8, 0]]))
    assert torch.equal(labels, before)
    with pytest.raises(ValueError, match="pad_token_id"):
        shift_tokens_right(labels, None, 1)
