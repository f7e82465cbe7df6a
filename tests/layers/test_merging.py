# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merging and unmerging in any order, by the model and layer by layer: what counts is never lost and never doubled."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.effects import move
from support.helpers import assert_close, assert_equal, refused, seeded, warned
from support.method_options import OF_ROWS, OPTIONS, keeps_weight, linear_methods, mergeable_methods
from torch import nn
from torch.nn.utils import parametrizations

from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    weight_tying_report,
)
from peft.anatomy.walking import adapter_modules
from peft.helpers import rescale_adapter_scale
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, ReplacementLayer


IDS = torch.tensor([[1, 5, 3, 2], [7, 3, 0, 4]])


class Tied(nn.Module):
    """An embedding, a hidden layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(24, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids to logits."""
        return self.head(torch.tanh(self.hidden(self.words(ids))))


def tied() -> Tied:
    """The model above, in eval mode."""
    with seeded():
        return Tied().eval()


def moved(model: PeftModel, seed: int = 1) -> PeftModel:
    """Let the adapters of a model matter."""
    layers = [module for _, module in adapter_modules(model) if isinstance(module, BaseTunerLayer)]
    tensors = {
        id(p): p for layer in layers for name in layer.available_adapters for p in layer.adapter_parameters(name)
    }
    move([p for p in tensors.values() if p.is_floating_point()], lambda: model.eval()(IDS), seed)
    return model.eval()


# methods that keep a tie of an embedding and a head, with one adapter for both; what is added to a bias is not tied,
# and the head has none to merge it into
ON_TIES = [*(name for name in linear_methods() if not keeps_weight(name)), *OF_ROWS, "LORA-dora"]
each_method_on_ties = pytest.mark.parametrize("method", ON_TIES)


def on_tie(method: str, **changes: Any) -> PeftModel:
    """Adapt embedding and head by one adapter."""
    name = method.partition("-")[0]
    options = {**OPTIONS.get(name, {}), "target_modules": ["words", "head"], **changes}
    if method == "LORA-dora":
        options["use_dora"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        with seeded():
            config = PEFT_TYPE_TO_CONFIG_MAPPING[name](ensure_weight_tying=True, **options)
            return moved(get_peft_model(tied(), config))


CALLS: dict[str, Callable[[PeftModel], Any]] = {
    "merge words": lambda model: model.get_base_model().words.merge(),
    "merge head": lambda model: model.get_base_model().head.merge(),
    "merge": lambda model: model.merge_adapter(),
    "unmerge words": lambda model: model.get_base_model().words.unmerge(),
    "unmerge head": lambda model: model.get_base_model().head.unmerge(),
    "unmerge": lambda model: model.unmerge_adapter(),
}
MERGED_BY = {"words": ("words",), "head": ("head",), "merge": ("words", "head"), "unmerge": ("words", "head")}


# ------------------------------------------------------------------------------------------ ties
@each_method_on_ties
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_every_order_of_calls_on_a_tie(method: str) -> None:
    model = on_tie(method)
    base = model.get_base_model()
    expected, weight = model(IDS), base.words.get_base_layer().weight
    values = weight.detach().clone()
    for calls in itertools.product(CALLS, repeat=3):
        merged = set()
        for call in calls:
            CALLS[call](model)
            members = MERGED_BY[call.split()[-1]]
            merged = merged - {*members} if call.startswith("unmerge") else merged | {*members}
            assert {name for name in ("words", "head") if getattr(base, name).merged} == merged, calls
            assert (base.words.weight is base.head.weight) == (len(merged) != 1), calls
            assert weight_tying_report(model).rows[0].shared == (len(merged) != 1), calls
        assert_close(model(IDS), expected, atol=1e-3)
        for name in merged:
            getattr(base, name).unmerge()
        assert base.words.weight is base.head.weight is weight
        assert_close(weight, values, atol=1e-4)
        with torch.no_grad():
            weight.copy_(values)  # so that rounding does not add up


def test_layers_that_are_merged_one_by_one_share_a_weight_in_the_end() -> None:
    model = on_tie("LORA")
    delta = model.get_base_model().words.get_delta_weight("default")
    before = model.get_base_model().words.weight.detach().clone()
    for module in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        module.merge()
    base = model.get_base_model()
    assert base.words.weight is base.head.weight
    assert_close(base.words.weight, before + delta)
    assert weight_tying_report(model).holds
    for module in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        module.unmerge()
    assert base.words.weight is base.head.weight
    assert_close(base.words.weight, before)


def test_the_report_says_that_members_are_not_merged_alike() -> None:
    with pytest.warns(PeftWarning, match="share a weight"):
        model = moved(get_peft_model(tied(), LoraConfig(r=2, target_modules=["words"])))
    weight = model.get_base_model().head.weight
    assert weight_tying_report(model).rows[0].shared
    model.merge_adapter()
    row = weight_tying_report(model).rows[0]
    assert (row.members, row.shared) == (("words.weight", "head.weight"), False)
    assert model.get_base_model().head.weight is weight
    model.unmerge_adapter()
    assert weight_tying_report(model).rows[0].shared


def test_a_second_adapter_finds_ties_that_merging_has_parted() -> None:
    with pytest.warns(PeftWarning, match="share a weight"):
        model = moved(get_peft_model(tied(), LoraConfig(r=2, target_modules=["words"])))
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["words", "head"], ensure_weight_tying=True))
    base = model.get_base_model()
    model.unmerge_adapter()
    assert base.words.weight is base.head.weight
    assert base.head.source("b") is base.words


def test_an_owner_that_is_deleted_leaves_nothing_in_the_weights_of_its_followers() -> None:
    model = on_tie("LORA")
    base = model.get_base_model()
    with seeded(7):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["words", "head"], ensure_weight_tying=True))
    before = base.words.weight.detach().clone()
    base.head.merge()
    base.words.delete_adapter("default")
    assert not base.head.merged and base.words.weight is base.head.weight
    assert_equal(base.head.weight, before)


# ------------------------------------------------------------------------------------------ several adapters
MIXED: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["hidden"]),
    "loha": lambda: LoHaConfig(r=2, target_modules=["hidden"]),
    "lokr": lambda: LoKrConfig(r=2, target_modules=["hidden"]),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=["hidden"]),
}


def mixed(*names: str) -> PeftModel:
    """A model with an adapter of each of these methods, all active."""
    with seeded():
        model = get_peft_model(tied(), MIXED[names[0]](), names[0], mixed=True)
        for name in names[1:]:
            model.add_adapter(name, MIXED[name]())
        model.set_adapter(list(names))
    return moved(model)


@pytest.mark.parametrize("names", list(itertools.permutations(["lora", "oft", "loha"], 2)), ids="-".join)
@pytest.mark.filterwarnings("ignore:(not merged|already merged|no adapter):peft.utils.warning.PeftWarning")
def test_merging_one_method_of_several_keeps_the_output(names: tuple[str, ...]) -> None:
    for calls in itertools.permutations([[names[0]], [names[1]], list(names)]):
        model = mixed(*names)
        expected, before = model(IDS), model.get_base_model().hidden.weight.detach().clone()
        for call in calls:
            model.merge_adapter(call)
            assert_close(model(IDS), expected)
        layers = [layer for _, layer in adapter_modules(model)]
        assert all(layer.merged for layer in layers)
        layers[-1].unmerge()  # the inner one, on whose result the outer one works
        assert_close(model(IDS), expected)
        layers[-1].merge()
        assert all(layer.merged for layer in layers)
        layers[-1].unmerge()
        layers[0].unmerge()
        assert not any(layer.merged for layer in layers)
        assert_close(model(IDS), expected)
        assert_close(layers[0].weight, before)


def test_what_has_to_wait_for_another_adapter_says_so() -> None:
    model = mixed("oft", "lora")
    with warned("not merged in 1 layers", "'lora' works on what 'oft' leaves", "Merge that one too"):
        model.merge_adapter(["lora"])
    assert not any(layer.merged for _, layer in adapter_modules(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.merge_adapter(["oft", "lora"])
        model.unmerge_adapter()
        model.set_adapter(["lora"])
        model.merge_adapter(["lora"])


def test_single_layers_merge_in_the_order_of_the_forward_pass() -> None:
    model = mixed("oft", "lora")
    expected = model(IDS)
    outer, inner = [layer for _, layer in adapter_modules(model)]
    inner.merge()
    outer.merge()
    assert outer.merged and inner.merged
    assert_close(model(IDS), expected)


def test_what_is_merged_while_adapters_are_off_is_in_order_when_they_are_back() -> None:
    model = mixed("lora", "oft")
    expected = model(IDS)
    model.base_model.disable_adapter_layers()
    with pytest.warns(PeftWarning, match="'oft' works on what 'lora' leaves"):
        model.merge_adapter(["oft"])
    model.base_model.enable_adapter_layers()
    assert_close(model(IDS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.merge_adapter(["lora"])
    assert all(layer.merged for _, layer in adapter_modules(model))
    assert_close(model(IDS), expected)


@pytest.mark.parametrize("by_layer", [False, True])
def test_what_waits_while_adapters_are_off_is_not_said_to_be_merged(by_layer: bool) -> None:
    model = mixed("lora", "oft")
    outer, inner = [layer for _, layer in adapter_modules(model)]
    for layer in (outer, inner):
        layer.enable_adapters(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outer.merge() if by_layer else model.merge_adapter(["oft"])
    assert len(caught) == 1 and "not merged in 1 layers" in str(caught[0].message)
    with warned("lora is merged although adapters are switched off"):
        inner.merge()
    assert inner.merged and outer.merged


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_what_waits_for_an_adapter_is_merged_once_that_is_deleted(names: list[str]) -> None:
    with seeded():
        config = OFTConfig(oft_block_size=4, target_modules=["hidden"])
        model = get_peft_model(tied(), config, "one")
        for name in ("two", "three"):
            model.add_adapter(name, config)
    (layer,) = [layer for _, layer in adapter_modules(moved(model))]
    layer.set_adapter([*names, "three"])
    with warned("'three' works on what 'one' leaves"):
        layer.merge(adapter_names=["three"])
    layer.delete_adapter("one")
    if "two" in names:
        assert not layer.merged and layer._merge_state.waiting
        layer.delete_adapter("two")
    assert layer.merged_adapters == ["three"] and not layer._merge_state.waiting
    layer.unmerge()
    assert not layer.merged


def test_layers_that_are_switched_while_merged_keep_the_order() -> None:
    model = mixed("lora", "oft")
    expected = model(IDS)
    outer, inner = [layer for _, layer in adapter_modules(model)]
    model.set_adapter(["oft"])
    model.merge_adapter()
    with warned("'oft' works on what 'lora' leaves"):
        inner.set_adapter(["lora"])
    assert not outer.merged
    outer.set_adapter(["oft"])
    assert_close(model(IDS), expected)
    inner.set_adapter([])
    assert outer.merged


def test_adapters_of_a_layer_are_in_the_order_of_the_last_activation() -> None:
    with seeded():
        config = OFTConfig(oft_block_size=4, target_modules=["hidden"])
        model = get_peft_model(tied(), config, "one")
        model.add_adapter("two", config)
    (layer,) = [layer for _, layer in adapter_modules(moved(model))]
    outputs = {}
    for names in (["one", "two"], ["two", "one"]):
        layer.set_adapter(names)
        outputs[names[0]] = model(IDS)
    layer.merge()
    assert layer.merged_adapters == ["two", "one"]
    layer.set_adapter(["one", "two"])
    assert layer.merged_adapters == ["one", "two"]
    assert_close(model(IDS), outputs["one"])
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-3)


def test_only_the_named_adapter_is_merged_for_good() -> None:
    model = mixed("oft", "lora")
    model.set_adapter(["lora"])
    expected = model(IDS)
    model.set_adapter(["oft", "lora"])
    assert_close(model.merge_and_unload(adapter_names=["lora"])(IDS), expected)


def test_dora_beside_a_merged_adapter_takes_the_norm_of_the_base_weight() -> None:
    with seeded():
        model = get_peft_model(tied(), LoraConfig(r=2, target_modules=["hidden"]), "plain")
        model.add_adapter("dora", LoraConfig(r=2, target_modules=["hidden"], use_dora=True))
    moved(model).base_model.set_adapter(["plain", "dora"])
    expected = model(IDS)
    model.merge_adapter(["plain"])
    assert model.get_base_model().hidden.merged_adapters == ["plain"]
    assert_close(model(IDS), expected)
    model.merge_adapter(["dora"])
    assert model.get_base_model().hidden.merged_adapters == ["plain", "dora"]
    assert_close(model(IDS), expected)


# ------------------------------------------------------------------------------------------ changes while merged
@pytest.fixture(params=["merge", "merge words", "merge head"])
def merged_on_tie(request: pytest.FixtureRequest) -> Callable[[PeftModel], None]:
    """Merge the whole model, or one member of the tie."""
    return CALLS[request.param]


CHANGES: dict[str, Callable[[PeftModel, dict[str, torch.Tensor]], Any]] = {
    "load": lambda model, tensors: set_peft_model_state_dict(model, tensors),
    "set_scale": lambda model, tensors: model.get_base_model().words.set_scale("default", 3.0),
    "scale_layer": lambda model, tensors: model.get_base_model().words.scale_layer(3.0),
    "unscale_layer": lambda model, tensors: model.get_base_model().words.unscale_layer(3.0),
    "reset": lambda model, tensors: model.get_base_model().words.reset_lora_parameters("default", "gaussian"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["LORA", "LORA-dora"])
def test_an_adapter_that_changes_while_it_is_merged(
    method: str, change: str, merged_on_tie: Callable[[PeftModel], None]
) -> None:
    model = on_tie(method)
    tensors = {key: value * 1.5 for key, value in get_peft_model_state_dict(model).items()}
    reference, before = copy.deepcopy(model), model.get_base_model().words.weight.detach().clone()
    with seeded():
        CHANGES[change](reference, tensors)
    merged_on_tie(model)
    merged = [layer.merged for _, layer in adapter_modules(model)]
    with seeded():
        CHANGES[change](model, tensors)
    assert [layer.merged for _, layer in adapter_modules(model)] == merged
    assert_close(model(IDS), reference(IDS), atol=1e-4)
    model.unmerge_adapter()
    assert model.get_base_model().words.weight is model.get_base_model().head.weight
    assert_close(model.get_base_model().words.weight, before)


@pytest.mark.parametrize("method", ["LORA", "LORA-dora", "LOHA", "LOKR", "ADALORA"])
@pytest.mark.parametrize("call", ["set_scale", "scale_layer", "unscale_layer"])
def test_a_scaling_that_changes_while_it_is_merged(method: str, call: str) -> None:
    name, _, variant = method.partition("-")
    options = {**OPTIONS[name], **({"use_dora": True} if variant else {})}
    with seeded():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[name](target_modules=["hidden"], **options)
        model = moved(get_peft_model(tied(), config))
    layer, reference = model.get_base_model().hidden, copy.deepcopy(model)
    before = layer.weight.detach().clone()
    arguments = ("default", 3.0) if call == "set_scale" else (3.0,)
    getattr(reference.get_base_model().hidden, call)(*arguments)
    assert not torch.allclose(reference(IDS), model(IDS), atol=1e-3)
    model.merge_adapter()
    getattr(layer, call)(*arguments)
    assert layer.merged
    assert_close(model(IDS), reference(IDS), atol=1e-4)
    model.unmerge_adapter()
    assert_close(layer.weight, before)


def test_a_refused_load_leaves_an_adapter_merged() -> None:
    model = on_tie("LORA")
    model.merge_adapter()
    tensors = {key: value[:1] for key, value in get_peft_model_state_dict(model).items()}
    with refused(model, RuntimeError):
        set_peft_model_state_dict(model, tensors)
    assert model.get_base_model().words.merged


def test_rescaling_while_merged() -> None:
    model = on_tie("LORA")
    before = model.get_base_model().words.weight.detach().clone()
    full = model(IDS)
    with rescale_adapter_scale(model, 0.5):
        half = model(IDS)
    model.merge_adapter()
    with rescale_adapter_scale(model, 0.5):
        assert_close(model(IDS), half)
    assert_close(model(IDS), full)
    with rescale_adapter_scale(model, 0.5):
        model.unmerge_adapter()
    assert_close(model.get_base_model().words.weight, before)


def test_an_adapter_that_is_put_in_again_while_it_is_merged() -> None:
    model = mixed("lora")
    before = model.get_base_model().hidden.weight.detach().clone()
    model.merge_adapter()
    model.base_model.inject_adapter(model.get_base_model(), "lora")
    assert not model.get_base_model().hidden.merged
    assert_close(model.get_base_model().hidden.weight, before)


# ------------------------------------------------------------------------------------------ what is kept
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_what_is_kept_moves_with_the_model(copied: str, merged_on_tie: Callable[[PeftModel], None]) -> None:
    model = on_tie("LORA-dora")
    before = model.get_base_model().words.weight.detach().clone()
    merged_on_tie(model)
    made = {
        "itself": lambda: model,
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
    }[copied]()
    made.to(torch.bfloat16)
    made.unmerge_adapter()
    base = made.get_base_model()
    assert base.words.weight is base.head.weight
    assert_equal(base.words.weight, before.to(torch.bfloat16))
    assert made(IDS).dtype == torch.bfloat16
    if copied != "itself":
        model.unmerge_adapter()
        assert_equal(model.get_base_model().words.weight, before)


def test_a_refused_adapter_is_not_kept_by_the_layers_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed("lora")
    made: list[weakref.ref] = []
    create = type(model.base_model)._tuner_of

    def refusing(self: Any, config: Any) -> Any:
        tuner = create(self, config)
        make = type(tuner)._create_layer

        def create_and_refuse(*args: Any, **kwargs: Any) -> nn.Module:
            made.append(weakref.ref(make(tuner, *args, **kwargs)))
            raise ValueError("no")

        tuner.__dict__["_create_layer"] = create_and_refuse
        return tuner

    monkeypatch.setattr(type(model.base_model), "_tuner_of", refusing)
    with pytest.raises(ValueError, match="no"):
        model.add_adapter("loha", LoHaConfig(r=2, target_modules=["hidden"]))
    gc.collect()
    assert [ref() for ref in made] == [None]


# ------------------------------------------------------------------------------------------ weights that are computed
PARAMETRISATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_by_hook": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm_by_hook": torch.nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
CAN_BE_WRITTEN = ("weight_norm", "weight_norm_by_hook")
ON_LINEAR = [name for name in mergeable_methods() if name != "TRAINABLE_TOKENS"] + ["LORA-dora"]
each_parametrisation = pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def parametrised(parametrisation: str) -> Tied:
    """A model whose hidden layer computes its weight; it has been used."""
    base = tied()
    with seeded():
        PARAMETRISATIONS[parametrisation](base.hidden)
    base.eval()(IDS)
    return base


@pytest.mark.parametrize("method", ON_LINEAR)
@each_parametrisation
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_merging_through_a_parametrisation(parametrisation: str, method: str) -> None:
    name, _, variant = method.partition("-")
    options = {**OPTIONS.get(name, {}), **({"use_dora": True} if variant else {})}
    with seeded():
        base = parametrised(parametrisation)
        before, config = base(IDS), PEFT_TYPE_TO_CONFIG_MAPPING[name](target_modules=["hidden"], **options)
        model = moved(get_peft_model(base, config))
    adapted = model(IDS)
    assert not torch.allclose(adapted, before, atol=1e-3)
    layer = base.hidden
    # a copy, or a bias, is merged without a write to the weight
    if parametrisation in CAN_BE_WRITTEN or isinstance(layer, ReplacementLayer) or keeps_weight(name):
        for merging in (model.merge_adapter, lambda: layer.merge(safe_merge=True)):
            merging()
            assert layer.merged
            assert_close(model(IDS), adapted)
            model.unmerge_adapter()
            assert_equal(model(IDS), adapted)
            with model.disable_adapter():
                assert_close(model(IDS), before)
        assert_close(model.merge_and_unload()(IDS), adapted)
        return
    for refusing in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with refused(model, NotImplementedError, "is computed by", "Keep the adapter unmerged"):
            refusing()
        assert_equal(model(IDS), adapted)
    assert_close(model.unload()(IDS), before)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
@each_parametrisation
def test_starts_that_change_the_base_are_refused_where_it_is_computed(parametrisation: str, start: str) -> None:
    base = parametrised(parametrisation)
    before = base(IDS)
    with refused(base, ValueError, "computes anew in each forward pass", "another initialisation"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["hidden"], init_lora_weights=start))
    assert_equal(base(IDS), before)


@each_parametrisation
def test_values_that_a_layer_computes_can_be_set(parametrisation: str) -> None:
    base = parametrised(parametrisation)
    get_peft_model(base, LoraConfig(r=2, target_modules=["hidden"]))
    values = torch.linspace(-1, 1, 256).reshape(16, 16)
    if parametrisation in CAN_BE_WRITTEN:
        base.hidden.set_base_weight(values)
        base(IDS)
        assert_close(base.hidden.weight, values)
    else:
        with refused(base, NotImplementedError, "is computed by"):
            base.hidden.set_base_weight(values)


def test_what_computes_a_weight_is_no_target() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert model.base_model.targeted_module_names == ["0"]
