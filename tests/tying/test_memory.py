# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Ties of several objects over one memory; what is trained as one stays one, whatever replaces parameters."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from support.tied_models import OutputFirst, Transposed, TwoLinears, llama
from torch import nn

from peft import (
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
    plan_weight_tying,
    weight_tying_report,
)
from peft.tying.groups import find_tied_groups


IDS = torch.tensor([[1, 5, 3, 2]])


def by_data(model: OutputFirst) -> None:
    model.tokens.weight = nn.Parameter(torch.zeros(1))
    model.tokens.weight.data = model.head.weight.data


def by_parameter(model: OutputFirst) -> None:
    model.tokens.weight = nn.Parameter(model.head.weight)


def by_assigning(model: OutputFirst) -> None:
    model.load_state_dict(model.state_dict(), assign=True)


WAYS = (by_data, by_parameter, by_assigning)
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "saved": lambda **tying: LoraConfig(target_modules=["0"], modules_to_save=["head"], **tying),
    "additive": lambda **tying: LoraConfig(target_modules=["head"], init_lora_weights=False, **tying),
    "other": lambda **tying: LoHaConfig(target_modules=["head"], init_weights=False, **tying),
    "tokens": lambda **tying: TrainableTokensConfig(token_indices=[1, 5], target_modules=["head"], **tying),
}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def build(way: Callable[[nn.Module], None]) -> OutputFirst:
    """Make a model of two parameter objects over one memory."""
    torch.manual_seed(0)
    model = OutputFirst().eval()
    way(model)
    assert model.head.weight is not model.tokens.weight
    assert model.head.weight.data_ptr() == model.tokens.weight.data_ptr()
    return model


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("way", WAYS)
def test_one_memory_read_in_one_way_is_a_tie(way) -> None:
    model = build(way)
    assert [group.members for group in find_tied_groups(model)] == [("tokens.weight", "head.weight")]
    assert weight_tying_report(model).holds and weight_tying_report(model).rows


def test_views_that_overlap_are_no_tie() -> None:
    flat = torch.zeros(48)
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    for layer, view in zip(net, (flat[:16], flat[8:24], flat[16:32], flat[:16]), strict=True):
        layer.weight.data = view.view(4, 4)
    net[3].weight.data = net[3].weight.data.T
    assert find_tied_groups(net) == []


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_tied_adapters_merge_once_and_stay_tied(way, kind) -> None:
    config = CONFIGS[kind](ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        planned = plan_weight_tying(build(way), config)
        model = randomise(get_peft_model(build(way), config))
    assert [row.shared for row in planned.rows] == [True, True]
    assert weight_tying_report(model).to_dict() == planned.to_dict()
    expected = model(IDS)
    model.merge_adapter()
    close(model(IDS), expected)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).to(torch.float64).merge_and_unload()
    assert merged.head.weight is merged.tokens.weight
    close(merged(IDS).float(), expected)
    bare = model.unload()
    close(bare(IDS), build(way)(IDS))
    assert bare.head.weight is bare.tokens.weight


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "tokens"])
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_of_one_member_does_not_leak_into_the_other(way, kind) -> None:
    with pytest.warns(PeftWarning, match="ensure_weight_tying=True"):
        model = randomise(get_peft_model(build(way), CONFIGS[kind]()))
    expected, embedding = model(IDS), build(way).tokens.weight
    model.merge_adapter()
    assert torch.equal(model.get_base_model().tokens.weight, embedding)
    close(model(IDS), expected)
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.tokens.weight, embedding)
    close(merged(IDS), expected)


@pytest.mark.parametrize("way", WAYS)
def test_merging_after_the_objects_of_an_adapted_model_were_parted(way) -> None:
    model = randomise(get_peft_model(build(way), CONFIGS["additive"](ensure_weight_tying=True)))
    expected = model(IDS)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.get_base_model().head.base_layer.weight is not model.get_base_model().tokens.base_layer.weight
    assert weight_tying_report(model).holds
    merged = model.merge_and_unload()
    close(merged(IDS), expected)
    assert merged.head.weight.data_ptr() == merged.tokens.weight.data_ptr()


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_adapter_leaves_both_objects(way, monkeypatch) -> None:
    model = build(way)
    before = dict(model.named_parameters(remove_duplicate=False))
    monkeypatch.setattr("peft.tuners.lora.model.LoraModel._create_layer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_peft_model(model, CONFIGS["additive"](ensure_weight_tying=True))
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))


# ------------------------------------------------------------------------------------------ what is trained stays one
def saved_with_bias() -> nn.Module:
    config = LoraConfig(target_modules=["hidden"], modules_to_save=["lookup"], ensure_weight_tying=True)
    return get_peft_model(Transposed(), config)


def saved_head_first() -> nn.Module:
    return get_peft_model(OutputFirst(), CONFIGS["saved"](ensure_weight_tying=True))


def tokens_head_first() -> nn.Module:
    return get_peft_model(OutputFirst(), CONFIGS["tokens"](ensure_weight_tying=True))


def tokens_beside_lora() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]))


def replaced_layers() -> nn.Module:
    return get_peft_model(TwoLinears(), LNTuningConfig(target_modules=["second"], ensure_weight_tying=True))


def places(model: nn.Module) -> dict[str, int]:
    """Say for each trained name which of the trained parameters it is."""
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    order = list(dict.fromkeys(map(id, trained.values())))
    return {name: order.index(id(p)) for name, p in trained.items()}


def from_a_file(model: nn.Module) -> nn.Module:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    return model


def part_by_part(model: nn.Module) -> nn.Module:
    for child in model.get_base_model().children():
        from_a_file_of(child)
    return model


def from_a_file_of(module: nn.Module) -> None:
    module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "replace", [from_a_file, part_by_part, lambda m: m.to("meta"), lambda m: m.to("meta").to_empty(device="cpu")]
)
@pytest.mark.parametrize(
    "make", [saved_with_bias, saved_head_first, tokens_head_first, tokens_beside_lora, replaced_layers]
)
def test_what_is_trained_as_one_is_one_object_whatever_replaces_parameters(make, replace) -> None:
    model = make()
    before = places(model)
    assert len(set(before.values())) < len(before)
    assert places(replace(model)) == before
    model.set_requires_grad("default")
    assert places(model) == before


def test_deleted_adapters_borrow_nothing() -> None:
    model = saved_head_first()
    model.add_adapter("other", CONFIGS["saved"](ensure_weight_tying=True))
    model.delete_adapter("default")
    assert from_a_file(model) and list(model.get_base_model().head._borrowed) == ["other"]
