# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a declaration can say, each on a method of a few lines that nobody else has."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.registry import methods_put_back
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.methods import (
    Frozen,
    Kept,
    PeftValueError,
    Shape,
    Trained,
    TyingConfig,
    check_counts,
    check_magnitudes,
    method,
)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget the methods of each test."""
    with methods_put_back():
        yield


@dataclass
class ToyConfig(TyingConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    size: int = 2
    size_pattern: dict[str, int] = field(default_factory=dict)
    toy_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TOY"


def declare(functions: dict[str, Any], **options: Any) -> type:
    return method("TOY", ToyConfig, **options)(type("Toy", (), {"__module__": __name__, **functions}))


def adapted(declared: type, base: nn.Module | None = None, **fields: Any) -> tuple[PeftModel, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4) if base is None else base)
    model = get_peft_model(net, ToyConfig(target_modules=["0"], **fields))
    return model, net[0]


def merges_alike(model: PeftModel, x: torch.Tensor) -> None:
    model.eval()
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_values_of_patterns_reach_the_functions() -> None:
    toy = declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained((c.size, shape[1]), 1.0)},
            "delta": lambda t, shape, c: t.a.sum(0).expand(shape) * c.size,
        },
        patterns={"size": "size_pattern"},
        settings={"toy_size": "size"},
    )
    _, layer = adapted(toy, size_pattern={"0": 3})
    assert layer.toy_a["default"].shape == (3, 6) and layer.toy_size["default"] == 3
    assert torch.equal(layer.get_delta_weight("default"), torch.full((4, 6), 9.0))
    layer.toy_size["default"] = 1
    assert torch.equal(layer.get_delta_weight("default"), torch.full((4, 6), 3.0))


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(3, 4, (1, 2)), nn.Embedding(6, 4)])
def test_functions_see_every_kind_as_out_and_in(base: nn.Module) -> None:
    seen = []

    def delta(t: Any, shape: Shape, c: ToyConfig) -> torch.Tensor:
        seen.append(tuple(shape))
        return t.a

    toy = declare(
        {"trained": ("a",), "tensors": lambda shape, c: {"a": Trained(shape, nn.init.normal_)}, "delta": delta},
        kinds={type(base): "ToyLayerOfAKind"},
    )
    model, layer = adapted(toy, base)
    assert layer.get_delta_weight("default").shape == base.weight.shape and set(seen) == {(4, 6)}
    x = {nn.Conv2d: torch.randn(2, 3, 5, 5), nn.Embedding: torch.tensor([[1, 5]])}.get(type(base), torch.randn(2, 6))
    merges_alike(model, x)


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(3, 4, (1, 2)), nn.Embedding(6, 4)])
def test_tensors_can_come_from_the_weight(base: nn.Module) -> None:
    toy = declare(
        {
            "trained": ("a",),
            "kept": ("w",),
            "tensors": lambda shape, c: {"a": Trained((), -1.0), "w": Kept(lambda: shape.weight.clone())},
            "delta": lambda t, shape, c: t.a * t.w,
        },
        kinds={type(base): "ToyLayerOfAKind"},
    )
    model, layer = adapted(toy, base)
    assert layer.toy_w["default"].shape == (4, 6) and not layer.toy_w["default"].requires_grad
    model.merge_adapter()
    assert not layer.get_base_layer().weight.any()


def test_delta_of_the_base_weight_is_that_of_the_unmerged_one() -> None:
    toy = declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained((shape[0], 1), nn.init.normal_)},
            "delta": lambda t, shape, c, w: t.a * w,
        }
    )
    model, layer = adapted(toy)
    model.add_adapter("other", ToyConfig(target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    before = layer.weight.clone()
    factor = layer.toy_a["default"] + layer.toy_a["other"]
    x = torch.randn(3, 6)
    expected = x @ ((1 + factor) * before).T + layer.bias
    torch.testing.assert_close(model(x), expected)
    merges_alike(model, x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("invertible", [True, False])
def test_weight_and_its_inverse(invertible: bool) -> None:
    functions = {
        "trained": ("a",),
        "tensors": lambda shape, c: {"a": Trained((), 2.0)},
        "weight": lambda t, w, c: w * t.a,
        "inverse": lambda t, w, c: w / t.a,
    }
    toy = declare(functions if invertible else {k: v for k, v in functions.items() if k != "inverse"})
    model, layer = adapted(toy)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), 2 * x @ layer.weight.T + layer.bias)
    assert layer.can_unmerge("default") is invertible
    merges_alike(model, x)


def test_kept_tensors_are_saved_and_frozen_ones_made_anew() -> None:
    toy = declare(
        {
            "trained": ("a",),
            "kept": ("k",),
            "frozen": ("f",),
            "tensors": lambda shape, c: {
                "a": Trained(shape, nn.init.normal_),
                "k": Kept(lambda: torch.rand(1)),
                "f": Frozen(lambda: torch.arange(shape[1]).float()),
            },
            "delta": lambda t, shape, c: t.a * t.k * t.f,
        }
    )
    model, layer = adapted(toy)
    saved = get_peft_model_state_dict(model)
    assert sorted(key.rpartition(".")[2] for key in saved) == ["toy_a", "toy_k"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["base_model.model.0.toy_a.default"]
    x = torch.randn(2, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert pickle.loads(pickle.dumps(layer.settings))["default"].size == 2
    model.bfloat16()
    assert layer.frozen("default", "f").dtype == torch.bfloat16
    merges = model.double()
    merges_alike(merges, x.double())


def test_shared_tensors_are_one_object() -> None:
    toy = declare(
        {
            "trained": ("a", "bank"),
            "frozen": ("basis",),
            "shared": ("bank", "basis"),
            "shared_tensors": lambda targets, c: {
                "bank": Trained((max(shape[1] for shape in targets.values()),), 1.0),
                "basis": Frozen(lambda: torch.ones(1)),
            },
            "tensors": lambda shape, c: {"a": Trained((shape[0], 1), 1.0)},
            "delta": lambda t, shape, c: t.a * t.bank[: shape[1]] * t.basis,
        }
    )
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model = get_peft_model(net, ToyConfig(target_modules=["0", "1"]))
    assert net[0].toy_bank["default"] is net[1].toy_bank["default"] and net[0].toy_bank["default"].requires_grad
    assert len([key for key in get_peft_model_state_dict(model) if "bank" in key]) == 1
    assert toy.Model is type(model.base_model)
    assert torch.equal(net[1].get_delta_weight("default"), torch.ones(3, 4))


def test_input_is_dropped_for_apply() -> None:
    toy = declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained(shape, nn.init.normal_)},
            "delta": lambda t, shape, c: t.a,
            "apply": lambda t, x, shape, c: x @ t.a.T,
        },
        dropout="toy_dropout",
    )
    model, layer = adapted(toy, toy_dropout=1.0)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.train()(x), layer.base_layer(x))
    merges_alike(model, x)


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(3, 4, 2)])
def test_factors_are_multiplied_one_by_one(base: nn.Module) -> None:
    toy = declare(
        {
            "trained": ("a", "b"),
            "tensors": lambda shape, c: {
                "a": Trained((2, shape[1]), nn.init.normal_),
                "b": Trained((shape[0], 2), nn.init.normal_),
            },
            "low_rank": lambda t, shape, c: (t.b, t.a),
        },
        kinds=dict.fromkeys((nn.Linear, Conv1D, nn.Conv2d), "Toy"),
    )
    model, layer = adapted(toy, copy.deepcopy(base))
    assert layer.builds_delta("default", None) == isinstance(base, nn.Conv2d)
    merges_alike(model, torch.randn(2, 3, 5, 5) if isinstance(base, nn.Conv2d) else torch.randn(3, 6))
    assert torch.equal(
        layer.as_rows(layer.get_delta_weight("default")), layer.toy_b["default"] @ layer.toy_a["default"]
    )


class Doubled(NamedTuple):
    """A tensor that is written as its double and the number of its entries."""

    is_used: bool
    endings = ("_doubled", "_count")

    def write(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return 2 * tensor, torch.tensor(tensor.numel())

    def read(self, doubled: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return doubled / 2


def test_tensors_are_saved_in_a_form_that_is_declared() -> None:
    toy = declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained(shape, nn.init.normal_)},
            "saved_forms": lambda c: {"a": Doubled(c.size == 3)},
            "delta": lambda t, shape, c: t.a,
        }
    )
    model, layer = adapted(toy, size=3)
    saved = get_peft_model_state_dict(model)
    assert saved.keys() == {"base_model.model.0.toy_a_doubled", "base_model.model.0.toy_a_count"}
    plain, other = adapted(toy)
    other.toy_a["default"].data.zero_()
    assert not set_peft_model_state_dict(plain, saved).unexpected_keys
    assert torch.equal(other.toy_a["default"], layer.toy_a["default"])
    assert [m.get_nb_savable_parameters() for m in (model, plain)] == [(24 + 2, 0), (24, 0)]  # a long counts as two


def test_parameters_in_a_checkpoint_are_counted(capsys: pytest.CaptureFixture) -> None:
    declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained(shape)},
            "delta": lambda t, shape, c: t.a,
        }
    )
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model = get_peft_model(net, ToyConfig(target_modules=["0"], modules_to_save=["1"]))
    assert model.get_nb_savable_parameters() == (24, 10)
    model.print_savable_parameters()
    assert capsys.readouterr().out == "TOY parameters to save (as float32): 24 || all parameters to save: 34\n"
    with pytest.raises(ValueError, match="'other'"):
        model.get_nb_savable_parameters("other")


def test_numbers_of_a_config_are_checked() -> None:
    check_counts(ToyConfig(), "size")
    check_magnitudes(ToyConfig(), "size", "toy_dropout")
    for value in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=f"size must be a positive integer, found {value}"):
            check_counts(ToyConfig(size=value), "size")
    with pytest.raises(ValueError, match="size=-2 and toy_dropout=0.0 are magnitudes"):
        check_magnitudes(ToyConfig(size=-2), "size", "toy_dropout")


def test_penalty_joins_the_loss_and_steps_are_told() -> None:
    steps = []
    toy = declare(
        {
            "trained": ("a",),
            "tensors": lambda shape, c: {"a": Trained(shape, 1.0)},
            "delta": lambda t, shape, c: t.a,
            "penalty": lambda t, c: t.a.sum(),
            "after_step": lambda model, c, step: steps.append((c.size, step)),
        }
    )
    base = nn.Linear(6, 4)
    model, _ = adapted(toy, base)
    tuner = model.base_model
    tuner.model.forward = lambda x: SimpleNamespace(loss=torch.tensor(0.5))
    assert tuner(torch.randn(1, 6)).loss.item() == 24.5
    tuner.after_step(7)
    assert steps == [(2, 7)]
    assert toy.Layer in type(tuner.model[0]).__mro__


def test_refusals_of_a_declaration() -> None:
    def check(c: ToyConfig, others: list[ToyConfig]) -> None:
        if any(other.size != c.size for other in others):
            raise PeftValueError("sizes differ")

    toy = declare(
        {
            "trained": ("a",),
            "check": check,
            "tensors": lambda shape, c: {"a": Trained(shape)},
            "delta": lambda t, shape, c: t.b,
        }
    )
    model, layer = adapted(toy)
    with pytest.raises(PeftValueError, match="sizes differ"):
        model.add_adapter("other", ToyConfig(target_modules=["0"], size=3))
    assert list(layer.toy_a) == ["default"]
    with pytest.raises(AttributeError, match="declares no tensor 'b'"):
        layer.get_delta_weight("default")
