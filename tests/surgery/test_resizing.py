# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The vocabulary of a model is resized while adapters are in it."""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import (
    VOCABULARY,
    WIDTH,
    assert_close,
    assert_equal,
    bert_classifier,
    gpt2,
    llama,
    logits,
    randomise,
    refused,
    token_ids,
    warned,
)
from support.tied_models import TIED_MODELS
from support.tied_models import VOCABULARY as TIED_VOCABULARY
from torch import nn
from transformers import LlamaForCausalLM

from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    weight_tying_report,
)


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

GROWN = VOCABULARY + 5
FEW = ("bert", "gpt2", "t5")
HUB_MODELS = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.wide)
    for name in TIED_MODELS
    if not name.startswith(("plain", "multi"))
]
OLD, NEW = token_ids(), torch.tensor([[3, VOCABULARY + 1, VOCABULARY + 4]])
NOTHING, TIE = {}, {"ensure_weight_tying": True}
ROUTES = {
    "elsewhere": (LoraConfig, {"target_modules": ["q_proj"]}, False),
    "embedding": (LoraConfig, {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "head": (LoraConfig, {"target_modules": ["q_proj", "lm_head"]}, False),
    "both": (LoraConfig, {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "tied embedding": (LoraConfig, {"target_modules": ["q_proj", "embed_tokens"], **TIE}, True),
    "tied head": (LoraConfig, {"target_modules": ["lm_head"], **TIE}, True),
    "saved": (LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved head": (LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved embedding": (LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved model": (LoraConfig, {"target_modules": ["lm_head"], "modules_to_save": ["model"]}, False),
    "tied saved": (LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **TIE}, True),
    "tokens": (LoraConfig, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, False),
    "tied tokens": (LoraConfig, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5], **TIE}, True),
    "token adapter": (TrainableTokensConfig, {"token_indices": [3, 5], "target_modules": ["embed_tokens"]}, False),
    "tied, elsewhere": (LoraConfig, {"target_modules": ["q_proj"]}, True),
    "scaling elsewhere": (IA3Config, {"target_modules": ["k_proj"], "feedforward_modules": []}, False),
}  # fmt: skip
routes = pytest.mark.parametrize("route", ROUTES)


def adapted(route: str, base: nn.Module | None = None) -> PeftModel:
    """A model with an adapter that has an effect, and another one that is not active."""
    config_cls, options, tied = ROUTES[route]
    rank = {"r": 2} if config_cls is LoraConfig else {}
    model = get_peft_model(llama(tied=tied) if base is None else base, config_cls(**rank, **options)).eval()
    randomise(model, "lora_|modules_to_save|trainable_tokens|ia3")
    return model


@routes
@pytest.mark.parametrize("rows", [GROWN, VOCABULARY - 4])
def test_old_tokens_are_computed_as_before(route: str, rows: int) -> None:
    model = adapted(route)
    ids = torch.tensor([[3, 5, 7, 20]])
    expected, base = logits(model, ids), None
    with model.disable_adapter():
        base = logits(model, ids)
    parameters = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    ties = [(row.members, row.shared) for row in weight_tying_report(model).rows]
    model.resize_token_embeddings(rows)
    kept = min(rows, VOCABULARY)
    assert logits(model, ids).shape[-1] == rows
    assert_close(logits(model, ids)[..., :kept], expected[..., :kept])
    with model.disable_adapter():
        assert_close(logits(model, ids)[..., :kept], base[..., :kept])
    assert {name: id(p) for name, p in model.named_parameters() if p.requires_grad} == parameters
    assert [(row.members, row.shared) for row in weight_tying_report(model).rows] == ties


@routes
def test_a_resized_model_works_like_any_other(route: str, tmp_path: Path) -> None:
    model = adapted(route)
    model.resize_token_embeddings(VOCABULARY + 2, pad_to_multiple_of=37)
    expected = logits(model, NEW)
    assert expected.shape[-1] == GROWN
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(other, NEW), expected)
        other.resize_token_embeddings(GROWN + 1)
        assert_close(logits(other, NEW)[..., :GROWN], expected)
    model.train()
    model(NEW, labels=NEW).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
    model.eval()
    model.merge_adapter()
    assert_close(logits(model, NEW), expected, atol=1e-4)
    model.unmerge_adapter()
    assert_close(logits(model, NEW), expected, atol=1e-4)
    whole = route in ("saved", "tied saved")  # what adapters have trained has all rows, and is in the file anyway
    with nullcontext() if whole else warned("differ from the published base model's"):
        model.save_pretrained(tmp_path)
    base = llama(tied=ROUTES[route][2])
    base.resize_token_embeddings(GROWN)
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path, strict=True), NEW), expected, atol=1e-4)
    merged = model.merge_and_unload()
    assert_close(logits(merged, NEW), expected, atol=1e-4)
    merged.resize_token_embeddings(GROWN + 3)
    assert logits(merged, NEW).shape[-1] == GROWN + 3


@routes
def test_new_tokens_start_from_the_base_model(route: str) -> None:
    model = adapted(route)
    model.resize_token_embeddings(GROWN)
    base = model.get_base_model()
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        bare = getattr(layer, "original_module", getattr(layer, "base_layer", layer))
        weight = layer.modules_to_save["default"].weight if hasattr(layer, "modules_to_save") else bare.weight
        assert_equal(weight[VOCABULARY:], bare.weight[VOCABULARY:])
        assert len(weight) == GROWN
        assert bare.weight.requires_grad == (route == "saved model" and layer is not base.lm_head)  # in a trained copy
        delta = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else torch.zeros(GROWN, WIDTH)
        assert delta[VOCABULARY:].count_nonzero() == 0


def test_several_adapters_are_resized() -> None:
    model = adapted("embedding")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["embed_tokens"]))
    randomise(model, "other")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, OLD)
    model.resize_token_embeddings(GROWN)
    for name, before in expected.items():
        model.set_adapter(name)
        assert_close(logits(model, OLD)[..., :VOCABULARY], before)


def test_other_models_and_places() -> None:
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["wte"], **TIE)).eval()
    randomise(model)
    expected = logits(model, OLD)
    model.get_base_model().resize_token_embeddings(GROWN)
    assert_close(logits(model, OLD)[..., :VOCABULARY], expected)
    model = get_peft_model(bert_classifier(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).eval()
    expected = logits(model, OLD)
    model.resize_token_embeddings(GROWN)
    assert_equal(logits(model, OLD), expected)


@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.wide)])
@pytest.mark.parametrize("route", ["target_modules", "modules_to_save", "trainable_token_indices"])
@pytest.mark.parametrize("name", HUB_MODELS)
def test_every_way_of_tying(name: str, route: str, mixed: bool) -> None:
    case = TIED_MODELS[name]
    options = {
        "target_modules": {"target_modules": [case.outputs]},
        "modules_to_save": {"target_modules": case.targets, "modules_to_save": [case.outputs]},
        "trainable_token_indices": {"target_modules": case.targets, "trainable_token_indices": {case.inputs: [3]}},
    }[route]
    config = LoraConfig(
        r=2, ensure_weight_tying=True, fan_in_fan_out=name == "gpt2" and route != "target_modules", **options
    )
    model = get_peft_model(case.build(), config, mixed=mixed).eval()
    randomise(model, "lora_|modules_to_save|trainable_tokens_delta")
    expected, report = case.forward(model), weight_tying_report(model)
    model.resize_token_embeddings(TIED_VOCABULARY + 3)
    assert_close(case.forward(model)[..., :TIED_VOCABULARY], expected)
    assert [row.shared for row in weight_tying_report(model).rows] == [row.shared for row in report.rows]
    expected = case.forward(model)
    assert_close(case.forward(model.merge_and_unload()), expected, atol=1e-4)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_prompts(saved: list[str] | None) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=saved)
    model = get_peft_model(llama(), config).eval()
    expected = logits(model, OLD)
    model.resize_token_embeddings(GROWN)
    assert_close(logits(model, OLD)[..., :VOCABULARY], expected)
    assert logits(model, NEW).shape[-1] == GROWN


# ------------------------------------------------------------------------------------------ refusals
REFUSED: dict[str, tuple[Any, int]] = {
    "norms": (LoraConfig(target_modules=["lm_head"], use_dora=True), GROWN),
    "scales": (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), GROWN),
    "tokens that would be gone": (TrainableTokensConfig(token_indices=[30], target_modules=["embed_tokens"]), 20),
}


@pytest.mark.parametrize("config, rows", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_resized_is_refused_before_anything_is_changed(config: Any, rows: int) -> None:
    model = get_peft_model(llama(), config)
    with refused(model, ValueError, "adapter 'default'", "nothing was changed"):
        model.resize_token_embeddings(rows)


def test_what_is_asked_for_is_passed_on_as_it_is() -> None:
    """Models may have a method of their own, which takes less."""

    class Own(LlamaForCausalLM):
        def resize_token_embeddings(self, new_num_tokens: int) -> nn.Module:
            return super().resize_token_embeddings(new_num_tokens)

    config = TrainableTokensConfig(token_indices=[30], target_modules=["embed_tokens"])
    model = get_peft_model(Own(llama().config), config)
    model.resize_token_embeddings(GROWN)
    assert logits(model, NEW).shape[-1] == GROWN
    model = get_peft_model(llama(), config)
    model.resize_token_embeddings(pad_to_multiple_of=31, new_num_tokens=20)
    assert logits(model, OLD).shape[-1] == 31


def test_merged_adapters_are_refused() -> None:
    model = adapted("embedding")
    model.merge_adapter()
    with refused(model, ValueError, "unmerge_adapter()"):
        model.resize_token_embeddings(GROWN)
    model.unmerge_adapter()
    model.resize_token_embeddings(GROWN)
