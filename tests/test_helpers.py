# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The helpers around models with adapters: scaling, signatures, types, choosing targets."""

import copy
import inspect
import pickle
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
    seeded,
    token_ids,
)
from torch import nn

from peft import LoraConfig, get_peft_model, shift_tokens_right
from peft.helpers import (
    DoraCaching,
    KappaTuneSelector,
    check_if_peft_model,
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
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


# ------------------------------------------------------------------------------------------ signatures
def test_a_model_shows_what_its_base_takes() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2)).eval()
    base = model.get_base_model()
    randomise(model)
    expected = logits(model, token_ids())
    assert "input_ids" not in inspect.signature(model.forward).parameters
    update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert_equal(logits(model, input_ids=token_ids()), expected)
    assert model.generate(input_ids=token_ids(), max_new_tokens=2).shape == (2, 7)
    names = ["default", "__base__"]
    with model.disable_adapter():
        plain = logits(model, token_ids())
    assert_close(logits(model, input_ids=token_ids(), adapter_names=names)[1], plain[1])


def test_signatures_of_tasks_stay() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    before = inspect.signature(model.forward)
    update_forward_signature(model)
    assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_call_their_own_method(copied) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    update_forward_signature(model)
    twin = copied(model)
    assert twin.forward.__self__ is twin
    update_generate_signature(twin)  # its base has none
    assert_equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_other_methods_have_no_signature_to_show() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2))
    with refused(model, ValueError, "backward", "forward", "generate"):
        update_signature(model, "backward")


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


# ------------------------------------------------------------------------------------------ choosing targets
class Experts(nn.Module):
    """Linear layers with condition numbers 6, 100 and 1, a large one, and matrices of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.six = self._linear([1, 2, 3, 6])
        self.hundred = self._linear([1, 1, 1, 100])
        self.one = self._linear([5, 5, 5, 5])
        self.singular = self._linear([1, 1, 1, 0])
        self.embedding = nn.Embedding(4, 4)
        self.large = nn.Linear(40, 4)
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, x])) for x in (2, 4)]))
        self.experts.up_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, x])) for x in (1, 2)]))

    @staticmethod
    def _linear(diagonal: list[float]) -> nn.Linear:
        layer = nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor(diagonal, dtype=torch.float32)))
        return layer


def selector(**options) -> KappaTuneSelector:
    return KappaTuneSelector(Experts(), **{"max_dim_size_to_analyze": 20, "show_progress": False, **options})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["one", "six", "hundred", "singular"]),
        ({"top_p": 0.5}, ["one", "six"]),
        ({"top_p": 0.01}, ["one"]),
        ({"num_modules": 3}, ["one", "six", "hundred"]),
        ({"threshold": 10.0}, ["one", "six"]),
        ({"threshold": 0.5}, []),
    ],
    ids=str,
)
def test_small_condition_numbers_come_first(options: dict, names: list[str]) -> None:
    assert selector().get_best_targets(**options) == names


def test_experts_count_by_their_mean() -> None:
    chosen = selector()
    assert chosen.get_best_target_parameters() == ["experts.up_proj", "experts.down_proj"]
    assert chosen.get_best_target_parameters(threshold=1.6) == ["experts.up_proj"]
    assert selector(moe_param_suffixes=["down_proj"]).get_best_target_parameters() == ["experts.down_proj"]


def test_large_weights_are_passed_over() -> None:
    assert "large" not in selector().get_best_targets()
    assert "large" in selector(max_dim_size_to_analyze=40).get_best_targets()


def test_targets_for_a_config() -> None:
    assert find_kappa_target_modules(Experts(), top_p=0.5, max_dim_size_to_analyze=20, show_progress=False) == {
        "target_modules": ["one", "six"],
        "target_parameters": ["experts.up_proj"],
    }
    with seeded():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    chosen = find_kappa_target_modules(net, show_progress=False)
    assert chosen["target_parameters"] is None
    config = LoraConfig(r=2, target_modules=chosen["target_modules"])
    assert get_peft_model(net, config).targeted_module_names == chosen["target_modules"]


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
