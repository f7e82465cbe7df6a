# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Ties hold everywhere: method x architecture x route x stage.

A cell puts one adapter on a tied model, trains it a little, and takes it through every stage. Methods enter by being
registered; what one needs to fit models that are 16 wide stands in `support/method_options.py`. Where a method cannot
adapt any member of a tie, the cell checks that it is refused and that nothing was changed.
"""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.effects import add_noise, rounding, size_that_matters
from support.helpers import refused, through_a_file
from support.method_options import OPTIONS, SECOND, is_mergeable, layered_methods
from support.tied_models import ALL_MODELS, INEXACT_MODELS, TiedModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, PeftWarning, get_peft_model, weight_tying_report
from peft.anatomy.walking import adapter_modules, is_adapter_module
from peft.checkpoints.aliases import split_aliases
from peft.layers.merging import model as _merging_model
from peft.layers.merging import weight as _merging_weight
from peft.layers.modules_to_save import ModulesToSaveWrapper
from peft.models import saving
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import targets
from peft.tuners.plan import AdapterPlan
from peft.tuners.tuners_utils import BaseTuner, UnsupportedLayerError
from peft.utils.error import PeftError


# LoRA's strategies, which are to hold for ties as well
VARIANTS: dict[str, Callable[[TiedModel], dict[str, Any]]] = {
    "LORA-dora": lambda tied: {"use_dora": True},
    "LORA-rslora": lambda tied: {
        "use_rslora": True,
        "rank_pattern": {tied.outputs: 1},
        "alpha_pattern": {tied.outputs: 3},
    },
}
TOKENS = [3, 5, 7]
ROUTES = ("saved at the input", "saved at the output", "targeted at the input", "targeted at the output", "tokens")
# A method on every architecture is much of the same, so the default run has these, and LoRA on all.
ALWAYS = ("llama", "t5", "bert", "plain_two_linears")


def methods() -> list[str]:
    """Name every registered method that puts layers into a model, and the variants of LoRA."""
    return [*layered_methods(), *VARIANTS]


@dataclass(frozen=True)
class Cell:
    """One method on one architecture by one route."""

    method: str
    name: str
    route: str

    @property
    def tied(self) -> TiedModel:
        """The architecture."""
        return ALL_MODELS[self.name]

    @property
    def tuner_cls(self) -> type[BaseTuner]:
        """Class of the method's model."""
        return PEFT_TYPE_TO_TUNER_MAPPING[self.method.partition("-")[0]]

    def config(self, **changes: Any) -> Any:
        """Make the config, with what the method needs."""
        method = self.method.partition("-")[0]
        config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
        values = {**OPTIONS.get(method, {}), "ensure_weight_tying": True}
        if self.method in VARIANTS:
            values.update(VARIANTS[self.method](self.tied))
        values["target_modules"] = list(self.tied.targets)
        side = self.tied.inputs if self.route.endswith("input") else self.tied.outputs
        if self.route.startswith("saved"):
            values["modules_to_save"] = [side]
        elif self.route.startswith("targeted"):
            # the usual targets too, but for methods that know nothing but embeddings
            values["target_modules"] = [side] if method == "TRAINABLE_TOKENS" else [*self.tied.targets, side]
        else:
            values["trainable_token_indices"] = {self.tied.inputs: TOKENS}
        if "fan_in_fan_out" in config_cls.__dataclass_fields__:
            values["fan_in_fan_out"] = "c_attn" in self.tied.targets
        return config_cls(task_type=self.tied.task_type, **{**values, **changes})

    def reason_to_skip(self) -> str | None:
        """Say why there is no such cell."""
        fields = PEFT_TYPE_TO_CONFIG_MAPPING[self.method.partition("-")[0]].__dataclass_fields__
        if self.route.startswith("saved") and "modules_to_save" not in fields:
            return "the method has no modules_to_save"
        if self.route == "tokens" and "trainable_token_indices" not in fields:
            return "the method has no trainable_token_indices"
        if self.route == "tokens" and self.name == "plain_two_linears":
            return "no embedding takes part in the tie"
        usual = [module for name, module in base(self.name).named_modules() if self._is_usual_target(name)]
        kinds = set(map(type, usual))
        if Conv1D in kinds and not any(issubclass(Conv1D, kind) for kind in self.tuner_cls.layer_classes):
            return "the method has no layer for Conv1D, which the usual targets are"
        if self.method == "BEFT" and any(
            getattr(module, "bias", None) is None for module in [*usual, *self._members()]
        ):
            return "the method cannot be merged into layers without a bias"
        return None

    def _is_usual_target(self, name: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for target in self.tied.targets)

    def is_refused(self) -> bool:
        """Say whether the method has a layer for none of the members, or not for all of them where it needs one."""
        if not self.route.startswith("targeted"):
            return False
        return len(self._members()) < (1 if self.is_mergeable() else len(self.tied.members))

    def _members(self) -> list[nn.Module]:
        """Give the members of the tie that the method has a layer for, where they are targets."""
        model = base(self.name)
        found = [model.get_submodule(member.rpartition(".")[0]) for member in self.tied.members]
        kinds = tuple(self.tuner_cls.layer_classes)
        return [module for module in found if self.route.startswith("targeted") and isinstance(module, kinds)]

    def is_mergeable(self) -> bool:
        """Say whether there is a weight for what the method does."""
        return is_mergeable(self.method)

    def adapted(self) -> PeftModel:
        """Put the adapter into a fresh model."""
        return get_peft_model(copy.deepcopy(base(self.name)), self.config())

    def outputs(self, model: nn.Module, **keywords: Any) -> torch.Tensor:
        """Run a model in eval mode."""
        with torch.no_grad():
            result = model.eval()(**self.tied.keywords(), **keywords)
        return getattr(result, "logits", result)


@cache
def base(name: str) -> nn.Module:
    """Build a base model once; whoever changes it takes a copy."""
    return ALL_MODELS[name].build()


def train(cell: Cell, model: PeftModel) -> None:
    """Take one step, and move every trained tensor so far that it matters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in parameters}) == len({p.data_ptr() for p in parameters})
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    cell.tied.forward(model).float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    optimizer.step()
    optimizer.zero_grad()
    add_noise(parameters, noise(cell), seed=1)


@cache
def noise(cell: Cell) -> float:
    """Find once by how much what a cell trains is moved."""
    model = cell.adapted()
    return size_that_matters([p for p in model.parameters() if p.requires_grad], lambda: cell.outputs(model))


def members(model: nn.Module, cell: Cell) -> list[nn.Parameter]:
    """Give what stands at the members of a model without adapters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [parameters[member] for member in cell.tied.members]


def is_one(parameters: list[nn.Parameter]) -> bool:
    return len({id(parameter) for parameter in parameters}) == 1


def same(cell: Cell, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare without any bound, where a model computes the same twice."""
    return near(one, other) if cell.name in INEXACT_MODELS else torch.equal(one, other)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare relative to the greatest entry."""
    bound = rounding(torch.float32) * other.double().abs().max().clamp(min=1)
    return bool((one.double() - other.double()).abs().max() <= bound)


# ------------------------------------------------------------------------------------------ stages
# Each gets a trained model that it may change, and what the model computes.
def report(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    rows = [row for row in weight_tying_report(model).rows if row.adapter == "default"]
    assert rows and all(row.shared for row in rows)


def disable(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    with model.disable_adapter():
        assert same(cell, cell.outputs(model), cell.outputs(base(cell.name)))
    assert same(cell, cell.outputs(model), expected)


def merge_and_unload(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    before = cell.outputs(base(cell.name))
    if not cell.is_mergeable():
        with refused(model, NotImplementedError, "depends on the call"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload()
    assert is_one(members(merged, cell))
    assert not any(True for _ in adapter_modules(merged))
    assert near(cell.outputs(merged), expected)
    assert not near(cell.outputs(merged), before)
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(folder / "merged")
        again = type(merged).from_pretrained(folder / "merged", attn_implementation="eager")
        assert is_one(members(again, cell))
        assert near(cell.outputs(again), expected)


def merge_and_unmerge(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    inner = model.get_base_model()
    held = [_base_parameter(inner, member) for member in cell.tied.members]
    if not cell.is_mergeable():
        with refused(model, NotImplementedError, "depends on the call"):
            model.merge_adapter()
        return
    model.merge_adapter()
    assert near(cell.outputs(model), expected)
    model.unmerge_adapter()
    assert [id(p) for p in held] == [id(_base_parameter(inner, member)) for member in cell.tied.members]
    assert near(cell.outputs(model), expected)


def _base_parameter(model: nn.Module, member: str) -> nn.Parameter:
    path, _, key = member.rpartition(".")
    module = model.get_submodule(path)
    while is_adapter_module(module):
        module = module._modules[module._base_names[0]]
    return module._parameters[key]


def unload(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    bare = model.unload()
    assert is_one(members(bare, cell))
    assert same(cell, cell.outputs(bare), cell.outputs(base(cell.name)))


def save_and_load(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    for number, options in enumerate(({}, {"low_cpu_mem_usage": True})):
        place = folder / f"saved{number}"
        model.save_pretrained(place, deduplicate_tied=bool(number))
        check_names_in_file(cell, model, place, once=bool(number))
        again = PeftModel.from_pretrained(copy.deepcopy(base(cell.name)), place, **options)
        assert same(cell, cell.outputs(again), expected)
        report(cell, again, expected, folder)
    again.load_adapter(place, "second")
    again.set_adapter("second")
    assert same(cell, cell.outputs(again), expected)
    again.delete_adapter("default")
    assert same(cell, cell.outputs(again), expected)


def check_names_in_file(cell: Cell, model: PeftModel, place: Any, once: bool) -> None:
    """Where readers that know nothing of ties look for a name, the file has it; or each tensor stands there once."""
    keys = load_file(place / "adapter_model.safetensors").keys()
    names = [f"base_model.model.{member}" for member in cell.tied.members]
    if not cell.route.startswith("saved"):  # the names of an adapter's tensors begin with that of the module
        names = [name.removesuffix("weight") for name in names]
    tied = [key for key in keys if not key.endswith(".bias")]  # which each member may have of its own
    present = [any(key.startswith(name) for key in tied) for name in names]
    if once:
        assert sum(present) == 1
    elif cell.route.startswith("saved") or (cell.route.startswith("targeted") and cell.method.startswith("LORA")):
        assert all(present)


def copies(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_a_file(model)):
        assert same(cell, cell.outputs(again), expected)
        report(cell, again, expected, folder)
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def half_precision(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    model.to(torch.bfloat16)
    report(cell, model, expected, folder)
    model.to(torch.float32)
    rounded = cell.outputs(model)
    report(cell, model, expected, folder)
    if cell.is_mergeable():
        assert near(cell.outputs(model.merge_and_unload()), rounded)


def second_adapter(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    # the same tokens, so that the same members are reached
    changes = {key: value for key, value in SECOND.get(cell.method, {}).items() if key != "token_indices"}
    model.add_adapter("second", cell.config(**changes))
    assert same(cell, cell.outputs(model), expected)
    model.set_adapter("second")
    train(cell, model)
    other = cell.outputs(model)
    report(cell, model, expected, folder)
    assert all(row.shared for row in weight_tying_report(model).rows)
    if cell.is_mergeable():
        assert near(cell.outputs(copy.deepcopy(model).merge_and_unload()), other)
    model.set_adapter("default")
    assert same(cell, cell.outputs(model), expected)
    model.delete_adapter("default")
    assert same(cell, cell.outputs(model), other)


def one_adapter_per_sample(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    if cell.name in ("multimodal", "mamba"):  # layers whose rows are not the samples
        return
    reason = "DoRA" if cell.method == "LORA-dora" else "a batch of its own"
    if cell.method == "LORA-dora" or not cell.tuner_cls.tuner_layer_cls.supports_mixed_batch:
        with pytest.raises(PeftError, match=reason):
            cell.outputs(model, adapter_names=["default"] * len(expected))
        return
    rows = len(expected)
    names = ["default", *["__base__"] * (rows - 1)]
    mixed = cell.outputs(model, adapter_names=names)
    assert near(mixed[0], expected[0])
    assert near(mixed[1:], cell.outputs(base(cell.name))[1:])


def tie_weights_again(cell: Cell, model: PeftModel, expected: torch.Tensor, folder: Any) -> None:
    inner = model.get_base_model()
    if hasattr(inner, "tie_weights"):
        inner.tie_weights()
    assert same(cell, cell.outputs(model), expected)
    report(cell, model, expected, folder)


STAGES: tuple[Callable, ...] = (
    report,
    disable,
    merge_and_unload,
    merge_and_unmerge,
    unload,
    save_and_load,
    copies,
    half_precision,
    second_adapter,
    one_adapter_per_sample,
    tie_weights_again,
)


def go_through(cell: Cell, folder: Any, stages: tuple[Callable, ...] = STAGES) -> None:
    """Adapt, train, and take the model through stages."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        warnings.filterwarnings("ignore", message="the active adapter 'default' was deleted")
        model = cell.adapted()
        train(cell, model)
        expected = cell.outputs(model)
        for stage in stages:
            stage(cell, copy.deepcopy(model), expected, folder)


def is_refused(cell: Cell) -> None:
    """Check that nothing is changed by what is refused."""
    model = copy.deepcopy(base(cell.name))
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(UnsupportedLayerError) as caught:
        get_peft_model(model, cell.config())
    text = str(caught.value)
    assert cell.tuner_cls.__name__ in text and "modules_to_save" in text
    assert any(member.rpartition(".")[0] in text for member in cell.tied.members)
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)


def cells() -> Iterator[Any]:
    """Yield every cell; none is left out without a reason."""
    for method in methods():
        for name in ALL_MODELS:
            for route in ROUTES:
                cell = Cell(method, name, route)
                marks = []
                if name not in ALWAYS and method != "LORA":
                    marks.append(pytest.mark.wide)
                yield pytest.param(cell, id=f"{method}-{name}-{route}".replace(" ", "_"), marks=marks)


@pytest.mark.parametrize("cell", list(cells()))
def test_ties_hold(cell: Cell, tmp_path: Any) -> None:
    reason = cell.reason_to_skip()
    if reason:
        pytest.skip(reason)
    if cell.is_refused():
        is_refused(cell)
    else:
        go_through(cell, tmp_path)


# ------------------------------------------------------------------------------------------ broken on purpose
def untie_after_wrapping(patch: pytest.MonkeyPatch) -> None:
    """What is trained at the last member is no longer what is trained at the others."""
    adapted = Cell.adapted

    def untied(cell: Cell) -> PeftModel:
        model = adapted(cell)
        last = model.get_base_model().get_submodule(cell.tied.members[-1].rpartition(".")[0])
        if isinstance(last, ModulesToSaveWrapper):
            copied = last.modules_to_save["default"]
            last.give_back("default")
            copied.weight = nn.Parameter(copied.weight.detach().clone())
        else:
            last.__dict__["_owners"] = {"default": copy.deepcopy(last.source("default"))}
        return model

    patch.setattr(Cell, "adapted", untied)


def merge_twice(patch: pytest.MonkeyPatch) -> None:
    """Every layer that uses a weight merges into it."""

    def merge_each(layers: list, adapter_names: Any, holders: int, for_good: bool) -> dict:
        for layer in layers:
            for name in layer.active_adapters:
                if layer.has_adapter(name):
                    with torch.no_grad():
                        layer.source(name).merge_weight_(name, layer.get_base_weight())
            layer._merge_state.contributions.extend((layer, n) for n in layer.active_adapters)
        return {}

    patch.setattr(_merging_model, "merge_weight", merge_each)


def merge_into_copies(patch: pytest.MonkeyPatch) -> None:
    """Members that are adapted alike get a weight each."""
    merge = _merging_weight.merge_sharing

    def merge_apart(members: list, apart: bool, for_good: bool) -> None:
        for member in members:
            merge([member], True, for_good)

    patch.setattr(_merging_weight, "merge_sharing", merge_apart)


def copy_the_follower(patch: pytest.MonkeyPatch) -> None:
    """A member that has to follow gets tensors of its own."""
    update = ModulesToSaveWrapper.update

    def without_owner(self: Any, adapter_name: str, tied_module: Any = None, only: Any = None, **kwargs: Any) -> None:
        update(self, adapter_name, only=only)

    patch.setattr(ModulesToSaveWrapper, "update", without_owner)
    patch.setattr(BaseTuner, "_place_layers", _placing_without_ties(BaseTuner._place_layers))


def _placing_without_ties(place: Callable) -> Callable:
    def place_alone(self: BaseTuner, plan: AdapterPlan) -> None:
        place(self, replace(plan, targets=tuple(target._replace(owner=None) for target in plan.targets)))

    return place_alone


def drop_aliases(patch: pytest.MonkeyPatch) -> None:
    """Only the owner's names are written."""
    collect = saving.collect_tensors

    def collect_owned(*args: Any) -> dict[str, torch.Tensor]:
        return split_aliases(collect(*args))[0]

    patch.setattr(saving, "collect_tensors", collect_owned)


def record_nothing(patch: pytest.MonkeyPatch) -> None:
    """The first stage finds no follower."""
    patch.setattr(targets, "find_followers", lambda *args, **kwargs: {})


MUTATIONS = (untie_after_wrapping, merge_twice, merge_into_copies, copy_the_follower, drop_aliases, record_nothing)
# by another route, a mutation has nothing to break
UNTOUCHED = {
    (merge_twice, "saved at the input"): "a module that is trained in full has no weight to merge into",
    (merge_into_copies, "saved at the input"): "a module that is trained in full has no weight to merge into",
}


@pytest.mark.parametrize("route", ["saved at the input", "targeted at the output"])
@pytest.mark.parametrize("name", ["llama", "t5", "plain_two_linears"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_cells_notice_what_is_broken(
    mutation: Callable, name: str, route: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    reason = UNTOUCHED.get((mutation, route))
    if reason:
        pytest.skip(reason)
    mutation(monkeypatch)
    with pytest.raises((AssertionError, PeftWarning)):  # a model that is called untied is noticed too
        go_through(Cell("LORA", name, route), tmp_path)
