# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The report says of every tie whether it holds: in the base model, for each adapter, after merging."""

import json
import warnings

import pytest
import torch
from support.tied_models import TIED_MODELS, llama
from test_record import SIDES
from test_tie import adapted, config_for, each_model, train
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftWarning, get_peft_model, plan_weight_tying, weight_tying_report
from peft.layers.modules_to_save import ModulesToSaveWrapper
from peft.tying.report import TyingRow


def rows_of(model: nn.Module, adapter: str | None = None) -> list[TyingRow]:
    """Give the rows of one adapter, or of the base model."""
    return [row for row in weight_tying_report(model).rows if row.adapter == adapter]


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_tied_adapter(tied, side):
    model = adapted(tied, side)
    report = weight_tying_report(model)
    assert report.holds
    (row,) = [row for row in rows_of(model, "default") if row.members == tied.members]
    matrix = dict(tied.build().named_parameters(remove_duplicate=False))[tied.members[0]]
    assert (row.owner, row.route, row.shared, row.bytes) == (
        tied.members[0],
        "modules_to_save",
        True,
        4 * matrix.numel(),
    )


@each_model
def test_tied_and_untied_adapter_side_by_side(tied):
    model = adapted(tied)
    apart = config_for(tied)
    apart.ensure_weight_tying = False
    model.add_adapter("apart", apart)
    assert not weight_tying_report(model).holds
    assert all(row.shared for row in rows_of(model) + rows_of(model, "default"))
    (row,) = [row for row in rows_of(model, "apart") if row.members == tied.members]
    assert not row.shared
    assert row.bytes == 2 * rows_of(model)[0].bytes


@pytest.mark.parametrize("name", TIED_MODELS)
def test_merged_model(name):
    tied = TIED_MODELS[name]
    model = adapted(tied)
    train(model, tied)
    merged = model.merge_and_unload()
    assert weight_tying_report(merged).holds
    assert [row.members for row in rows_of(merged)] == [row.members for row in rows_of(tied.build())]


def test_a_tie_that_is_broken_by_hand_is_seen():
    model = adapted(TIED_MODELS["llama"])
    head = model.get_base_model().lm_head
    assert isinstance(head, ModulesToSaveWrapper)
    head.modules_to_save["default"].weight = nn.Parameter(head.modules_to_save["default"].weight.detach().clone())
    assert not weight_tying_report(model).holds


def test_declared_ties_that_are_missing_are_seen():
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    report = weight_tying_report(model)
    assert not report.holds
    assert report.rows[0].route == "declared by the model"
    model.config.tie_word_embeddings = False
    assert weight_tying_report(model).rows == ()


def test_printed_and_as_plain_values():
    report = weight_tying_report(adapted(TIED_MODELS["llama"]))
    lines = str(report).splitlines()
    assert lines[0].split() == ["tied", "members", "(owner", "first)", "adapter", "route", "shared", "bytes"]
    assert [line.split()[-2] for line in lines[2:]] == ["yes", "yes"]
    content = json.loads(json.dumps(report.to_dict()))
    assert content["holds"] is True
    assert [row["adapter"] for row in content["rows"]] == [None, "default"]
    assert str(weight_tying_report(nn.Linear(2, 2))) == "no two modules of the model share a parameter"


def test_report_does_not_change_the_model():
    model = adapted(TIED_MODELS["bert"])
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    weight_tying_report(model)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)} == before


def test_model_with_injected_adapters_and_no_wrapper_around_it():
    model = TIED_MODELS["gpt2"].build()
    get_peft_model(model, config_for(TIED_MODELS["gpt2"]))
    assert [row.adapter for row in weight_tying_report(model).rows] == [None, "default"]
    assert torch.is_tensor(model.lm_head.weight)


# ------------------------------------------------------------------------------------------ plan
def route_config(tied, route: str, ensure: bool) -> LoraConfig:
    """Make the config of an adapter that reaches the tie by one route."""
    reached = {"modules_to_save": [tied.outputs]} if route == "modules_to_save" else {}
    targets = [*tied.targets, tied.outputs] if route == "target_modules" else tied.targets
    return LoraConfig(
        r=2, target_modules=targets, ensure_weight_tying=ensure, fan_in_fan_out="c_attn" in targets, **reached
    )


def warnings_of(function, *args) -> tuple:
    """Call a function; give its result and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [(str(w.message), w.filename) for w in caught if issubclass(w.category, PeftWarning)]


@pytest.mark.parametrize("ensure", [True, False])
@pytest.mark.parametrize("route", ["modules_to_save", "target_modules", "neither"])
@pytest.mark.parametrize("name", TIED_MODELS)
def test_the_plan_is_what_comes(name, route, ensure):
    tied = TIED_MODELS[name]
    model, config = tied.build(), route_config(TIED_MODELS[name], route, ensure)
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters(remove_duplicate=False)}
    settings = config.to_dict()
    plan, foretold = warnings_of(plan_weight_tying, model, config)
    assert {k: (id(p), p.requires_grad) for k, p in model.named_parameters(remove_duplicate=False)} == before
    assert (config.to_dict(), config.modules_to_tie) == (settings, None)
    adapted, said = warnings_of(get_peft_model, model, config)
    assert plan == weight_tying_report(adapted)
    assert foretold == said


def test_plan_for_a_second_adapter():
    tied = TIED_MODELS["llama"]
    model = adapted(tied)
    config = route_config(tied, "modules_to_save", True)
    plan = plan_weight_tying(model, config, "other")
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", config)
    assert plan == weight_tying_report(model)
    assert [row.adapter for row in plan.rows] == [None, "default", "other"]


def test_the_plan_refuses_what_the_injection_refuses():
    model = llama()
    config = LoraConfig(target_modules=["lm_head"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="can only be adapted in one way"):
        plan_weight_tying(model, config)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_plan_of_a_large_model_without_storage():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=128256, num_hidden_layers=80, **sizes, tie_word_embeddings=True)
        )
    model.tie_weights()  # on the meta device parameters do not come tied
    config = LoraConfig(r=16, target_modules="all-linear", modules_to_save=["lm_head"], ensure_weight_tying=True)
    base, trained = plan_weight_tying(model, config).rows
    assert base.members == trained.members == ("model.embed_tokens.weight", "lm_head.weight")
    assert (base.route, trained.route, base.shared, trained.shared) == ("base model", "modules_to_save", True, True)
    assert base.bytes == trained.bytes == 4 * 128256 * 8192
    assert type(model.model.embed_tokens) is nn.Embedding
