# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The three rules that a method can follow, proved on methods that are nothing but their math.

`Plus` adds a matrix to the weight, `Blow` multiplies each entry of the weight, `Gain` scales the input features and
`Boost` the output features. Whatever passes here, a method gets for the few lines that it writes.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    kinds,
    logits,
    randomise,
    refused,
    snapshot,
    token_ids,
    trainable,
    warned,
)
from support.registry import methods_put_back
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import PeftConfig, PeftModel, get_peft_model
from peft.anatomy.walking import bare_modules
from peft.functional import delete_adapter
from peft.layers.buffer_dict import BufferDict
from peft.tuners.tuners_utils import ActivationLayer, AdditiveLayer, BaseTuner, BaseTunerLayer, WeightLayer
from peft.utils import register_peft_method


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


# ------------------------------------------------------------------------------------------ the methods
@dataclass
class ToyConfig(PeftConfig):
    """What to adapt."""

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.name


class ToyLayer(BaseTunerLayer):
    """One parameter per adapter."""

    adapter_layer_names = ("toy_value",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        nn.Module.__init__(self)
        self._wrap(base_layer)
        self.toy_value = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.get_base_weight().shape)

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Make the parameter, at the value that changes nothing."""
        self.toy_value[adapter_name] = self.new_parameter(*self.shape())
        nn.init.zeros_(self.toy_value[adapter_name])
        self._trainable_adapters.add(adapter_name)


class PlusLayer(ToyLayer, AdditiveLayer, nn.Module):
    """W + value."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The parameter itself."""
        return self.toy_value[adapter]


class BlowLayer(ToyLayer, WeightLayer, nn.Module):
    """W * exp(value), entry by entry."""

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return weight * self.toy_value[adapter].exp()

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Divide."""
        return weight / self.toy_value[adapter].exp()


class OneWayLayer(ToyLayer, WeightLayer, nn.Module):
    """W * exp(value), and no way back."""

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return weight * self.toy_value[adapter].exp()


class GainLayer(ToyLayer, ActivationLayer, nn.Module):
    """Input features times (1 + value)."""

    def shape(self) -> tuple[int, ...]:
        """One factor per input feature."""
        return (self.in_features,)

    def feature_scale(self, adapter: str) -> torch.Tensor:
        """The factors."""
        return 1 + self.toy_value[adapter]

    def scales_input(self, adapter: str) -> bool:
        """Yes."""
        return True


class BoostLayer(GainLayer):
    """Output features times (1 + value)."""

    def shape(self) -> tuple[int, ...]:
        """One factor per output feature."""
        return (self.out_features,)

    def scales_input(self, adapter: str) -> bool:
        """No."""
        return False


@dataclass
class Toy:
    """A method: its classes, and its math in one line of plain torch."""

    config_cls: type[ToyConfig]
    reference: Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]]


def toy(layer: type[ToyLayer]) -> tuple[type[ToyConfig], type[BaseTuner]]:
    """Make the config and the tuner that belong to a layer; methods write no more than this."""
    name = f"TOY_{layer.__name__.removesuffix('Layer').upper()}"
    config_cls = type(f"{layer.__name__}Config", (ToyConfig,), {"name": name, "__module__": __name__})
    every_kind = dict.fromkeys((nn.Embedding, Conv1D, nn.Linear), layer)
    body = {"prefix": "toy_", "tuner_layer_cls": layer, "layer_classes": every_kind, "__module__": __name__}
    return config_cls, type(f"{layer.__name__}Model", (BaseTuner,), body)


PlusLayerConfig, PlusLayerModel = toy(PlusLayer)
BlowLayerConfig, BlowLayerModel = toy(BlowLayer)
OneWayLayerConfig, OneWayLayerModel = toy(OneWayLayer)
GainLayerConfig, GainLayerModel = toy(GainLayer)
BoostLayerConfig, BoostLayerModel = toy(BoostLayer)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Enter the methods into the registry while this file runs."""
    methods = [
        (PlusLayerConfig, PlusLayerModel),
        (BlowLayerConfig, BlowLayerModel),
        (OneWayLayerConfig, OneWayLayerModel),
        (GainLayerConfig, GainLayerModel),
        (BoostLayerConfig, BoostLayerModel),
    ]
    with methods_put_back():
        for config_cls, model_cls in methods:
            register_peft_method(name=config_cls.name, config_cls=config_cls, model_cls=model_cls, prefix="toy_")
        yield


def _per_output(layer: nn.Module, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    along_last = isinstance(layer, (Conv1D, nn.Embedding))
    changed = {"weight": layer.weight * (factors if along_last else factors[:, None])}
    bias = getattr(layer, "bias", None)
    return changed if bias is None else {**changed, "bias": bias * factors}


METHODS = {
    "plus": Toy(PlusLayerConfig, lambda layer, value: {"weight": layer.weight + value}),
    "blow": Toy(BlowLayerConfig, lambda layer, value: {"weight": layer.weight * value.exp()}),
    "gain": Toy(
        GainLayerConfig,
        lambda layer, value: {
            "weight": layer.weight * (1 + (value[:, None] if isinstance(layer, Conv1D) else value[None]))
        },
    ),
    "boost": Toy(BoostLayerConfig, lambda layer, value: _per_output(layer, 1 + value)),
}
# the input of an embedding is a token id, which cannot be scaled
CASES = [(method, kind) for method in METHODS for kind in ("emb", "conv", "lin") if (method, kind) != ("gain", "emb")]
each_case = pytest.mark.parametrize(("method", "kind"), CASES)
each_method = pytest.mark.parametrize("method", METHODS)

IDS = token_ids(vocabulary=12)


# ------------------------------------------------------------------------------------------ building blocks
def config(method: str, *names: str, **kwargs: Any) -> ToyConfig:
    """A config of a method."""
    return METHODS[method].config_cls(target_modules=list(names), **kwargs)


def adapted(method: str, *names: str, adapters: tuple[str, ...] = ("default",)) -> PeftModel:
    """A model with adapters whose parameters all have an effect."""
    model = get_peft_model(kinds(), config(method, *names), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(method, *names))
    randomise(model, "toy_")
    return model.eval()


def reference(method: str, model: PeftModel, *names: str, adapters: tuple[str, ...] = ("default",)) -> torch.Tensor:
    """What the model should compute: the plain base, with weights changed by the method's one line of math."""
    base = kinds().requires_grad_(False)
    for name in names:
        layer = base.get_submodule(name)
        for adapter in adapters:
            value = model.get_submodule(f"base_model.model.{name}").toy_value[adapter].detach()
            for key, tensor in METHODS[method].reference(layer, value).items():
                getattr(layer, key).copy_(tensor)
    return base(IDS)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the base tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "toy_" not in name}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ------------------------------------------------------------------------------------------ forward
@each_case
def test_fresh_adapter_changes_nothing(method: str, kind: str) -> None:
    expected = logits(kinds(), IDS)
    model = get_peft_model(kinds(), config(method, kind))
    assert_equal(logits(model, IDS), expected)
    assert trainable(model) == {f"base_model.model.{kind}.toy_value.default"}


@each_case
def test_forward_is_the_math(method: str, kind: str) -> None:
    model = adapted(method, kind)
    expected = reference(method, model, kind)
    assert differs(expected, logits(kinds(), IDS))
    assert_close(logits(model, IDS), expected)


@each_case
def test_gradient_reaches_the_adapter_alone(method: str, kind: str) -> None:
    model = adapted(method, kind)
    model(IDS).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable(model)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@each_method
def test_two_active_adapters_follow_one_another(method: str) -> None:
    model = adapted(method, "conv", "lin", adapters=("a", "b"))
    for names in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(names)
        assert_close(logits(model, IDS), reference(method, model, "conv", "lin", adapters=tuple(names)))
        assert {name.rpartition(".")[2] for name in trainable(model)} == set(names)


@each_case
def test_disabled_is_the_base_exactly(method: str, kind: str) -> None:
    model, expected = adapted(method, kind), logits(kinds(), IDS)
    before = logits(model, IDS)
    with model.disable_adapter():
        assert_equal(logits(model, IDS), expected)
        assert trainable(model) == set()
    assert_equal(logits(model, IDS), before)
    assert len(trainable(model)) == 1


@each_case
def test_batch_with_an_adapter_per_sample(method: str, kind: str) -> None:
    model = adapted(method, kind, adapters=("a", "b"))
    ids = token_ids(4, 5, 12)
    single = {"__base__": logits(kinds(), ids)}
    for name in ("a", "b"):
        model.set_adapter(name)
        single[name] = logits(model, ids)
    names = ["b", "__base__", "a", "b"]
    expected = torch.stack([single[name][i] for i, name in enumerate(names)])
    assert_close(logits(model, ids, adapter_names=names), expected)
    assert_close(logits(model, ids), single["b"])


def test_layer_without_the_active_adapter_is_the_base() -> None:
    model = get_peft_model(kinds(), config("plus", "lin"), adapter_name="a")
    model.add_adapter("b", config("plus", "conv"))
    randomise(model, "toy_")
    assert_close(logits(model, IDS), reference("plus", model, "lin", adapters=("a",)))
    model.set_adapter("b")
    assert_close(logits(model, IDS), reference("plus", model, "conv", adapters=("b",)))


@each_method
def test_half_precision_base(method: str) -> None:
    model = get_peft_model(kinds().to(torch.bfloat16), config(method, "conv", "lin"))
    randomise(model, "toy_")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = logits(model, IDS)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), reference(method, model, "conv", "lin"), atol=0.15)
    model.merge_adapter()
    assert {p.dtype for n, p in model.named_parameters() if "toy_" not in n} == {torch.bfloat16}
    assert_close(logits(model, IDS).float(), output.float(), atol=0.15)


# ------------------------------------------------------------------------------------------ merging
@each_case
def test_merging_keeps_the_output_and_unmerging_restores(method: str, kind: str) -> None:
    model = adapted(method, kind)
    before, expected = weights(model), logits(model, IDS)
    model.merge_adapter()
    assert worst(weights(model), before) > 1e-2
    assert_close(logits(model, IDS), expected)
    model.unmerge_adapter()
    assert worst(weights(model), before) < 1e-6
    assert_close(logits(model, IDS), expected)


@each_method
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_adapters_one_after_the_other(method: str, safe_merge: bool) -> None:
    model = adapted(method, "conv", "lin", adapters=("a", "b"))
    before = weights(model)
    model.merge_adapter(["a"], safe_merge=safe_merge)
    with warned("a"):
        model.merge_adapter(["a", "b"], safe_merge=safe_merge)
    assert model.base_model.model.lin.merged_adapters == ["a", "b"]
    assert_close(logits(model, IDS), reference(method, model, "conv", "lin", adapters=("a", "b")))
    model.unmerge_adapter()
    assert worst(weights(model), before) < 1e-5


@each_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(method: str, kind: str, bad: float) -> None:
    """The broken layer comes last, so the others would be merged already if nobody had looked first."""
    model = adapted(method, "conv", "lin", kind)
    last = model.get_submodule(f"base_model.model.{[n for n in ('emb', 'conv', 'lin') if n in ('lin', kind)][-1]}")
    with torch.no_grad():
        last.toy_value["default"].view(-1)[0] = bad
    with refused(model, ValueError, "default", "finite", "nothing was merged"):
        model.merge_adapter(safe_merge=True)
    with refused(model, ValueError, "default", "finite"):
        last.merge(safe_merge=True)
    with refused(model, ValueError, "default", "finite"):
        model.merge_and_unload(safe_merge=True)


@each_case
def test_merge_and_unload(method: str, kind: str) -> None:
    model = adapted(method, kind)
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert type(merged) is type(kinds())
    assert [type(m) for m in merged.modules()] == [type(m) for m in kinds().modules()]
    assert_close(logits(merged, IDS), expected)


@each_case
@pytest.mark.parametrize("merged_first", [False, True])
def test_unload_gives_the_base_back(method: str, kind: str, merged_first: bool) -> None:
    model = adapted(method, kind)
    if merged_first:
        model.merge_adapter()
    base = model.unload()
    assert [type(m) for m in base.modules()] == [type(m) for m in kinds().modules()]
    assert_close(logits(base, IDS), logits(kinds(), IDS), atol=1e-5 if merged_first else 0.0)


@each_method
def test_disabling_unmerges(method: str) -> None:
    model = adapted(method, "lin")
    expected = logits(model, IDS)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(logits(model, IDS), logits(kinds(), IDS))
    assert_close(logits(model, IDS), expected)


@each_method
def test_merging_one_layer(method: str) -> None:
    model = adapted(method, "conv", "lin")
    expected = logits(model, IDS)
    layer = model.base_model.model.lin
    layer.merge()
    assert layer.merged and not model.base_model.model.conv.merged
    assert_close(logits(model, IDS), expected)
    layer.unmerge()
    assert not layer.merged
    with warned("nothing to unmerge"):
        layer.unmerge()
    with refused(model, TypeError, "list", "'default'"):
        layer.merge(adapter_names="default")


def one_way() -> PeftModel:
    """A merged model whose method has no inverse."""
    model = get_peft_model(kinds(), OneWayLayerConfig(target_modules=["conv", "lin"]))
    model.add_adapter("other", OneWayLayerConfig(target_modules=["lin"]))
    randomise(model, "toy_")
    model.merge_adapter()
    return model


def scaled_by_zero() -> PeftModel:
    """A merged model with a factor of zero."""
    model = adapted("boost", "conv", "lin", adapters=("default", "other"))
    with torch.no_grad():
        model.base_model.model.conv.toy_value["default"][0] = -1
    model.merge_adapter()
    return model


@pytest.mark.parametrize("build", [one_way, scaled_by_zero])
@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.unmerge_adapter(),
        lambda model: [layer.unmerge() for layer in model.base_model._layers() if layer.merged],
        lambda model: delete_adapter(model, "default", "toy_"),
        lambda model: model.unload(),
        lambda model: model.base_model.disable_adapter_layers(),
    ],
    ids=["unmerge_adapter", "layer.unmerge", "delete_adapter", "unload", "disable"],
)
def test_what_has_no_way_back_is_kept_for_it(build: Callable, action: Callable) -> None:
    model = build()
    action(model)
    now = dict(bare_modules(model.get_base_model()))
    for name, module in kinds().named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            assert_close(now[name]._parameters[key], parameter)


# ------------------------------------------------------------------------------------------ deleting, copying
@each_method
def test_deleting_leaves_the_other(method: str) -> None:
    model = adapted(method, "conv", "lin", adapters=("a", "b"))
    with warned("'a'", "'b'"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and list(model.peft_config) == ["b"]
    assert not any(".a" in key for key in model.state_dict())
    assert_close(logits(model, IDS), reference(method, model, "conv", "lin", adapters=("b",)))
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"b"}


@each_method
def test_deleting_a_merged_adapter_from_the_layers_takes_it_out(method: str) -> None:
    model = adapted(method, "conv", "lin", adapters=("a", "b"))
    before = weights(model)
    model.base_model.set_adapter(["a", "b"])
    model.merge_adapter()
    delete_adapter(model, "a", "toy_")
    assert_close(logits(model, IDS), reference(method, model, "conv", "lin", adapters=("b",)))
    assert worst(before, weights(model)) < 1e-5 or model.base_model.model.lin.merged_adapters == ["b"]


@each_method
def test_a_merged_adapter_is_not_deleted_from_a_model(method: str) -> None:
    """Somebody who merges and then deletes may mean to keep the merged weight, so the model asks."""
    model = adapted(method, "conv", "lin", adapters=("a", "b"))
    model.merge_adapter(["a"])
    with refused(model, ValueError, "'a'", "unmerge_adapter", "merge_and_unload"):
        model.delete_adapter("a")
    expected = logits(model, IDS)
    model.delete_adapter("b")
    assert model.base_model.model.lin.merged_adapters == ["a"]
    assert_equal(logits(model, IDS), expected)
    model.unmerge_adapter()
    model.delete_adapter("a")
    assert_close(logits(model, IDS), logits(kinds(), IDS))


@each_method
def test_deleting_the_last_one_leaves_the_base(method: str) -> None:
    model = adapted(method, "lin")
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.peft_config
    assert_equal(logits(model, IDS), logits(kinds(), IDS))


@each_case
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_stand_alone(method: str, kind: str, duplicate: Callable) -> None:
    model = adapted(method, kind, adapters=("a", "b"))
    model.merge_adapter(["a"])
    before, expected = snapshot(model), logits(model, IDS)
    twin = duplicate(model)
    assert_equal(logits(twin, IDS), expected)
    twin.unmerge_adapter()
    twin.set_adapter("b")
    twin.delete_adapter("a")
    twin.add_adapter("c", config(method, kind))
    randomise(twin, "toy_", seed=5)
    assert snapshot(model) == before
    assert_equal(logits(model, IDS), expected)
    assert_close(logits(twin, IDS), reference(method, twin, kind, adapters=("b",)))


# ------------------------------------------------------------------------------------------ what a layer answers
def test_a_layer_answers_for_its_base() -> None:
    layer = adapted("plus", "lin").base_model.model.lin
    base = layer.get_base_layer()
    assert type(base) is nn.Linear
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (10, 6)
    assert layer.available_adapters == {"default"} and layer.has_adapter("default") and not layer.has_adapter("b")
    parameter = base.weight
    layer.set_base_weight(torch.zeros_like(base.weight))
    assert base.weight is parameter and not base.weight.any()


def test_a_layer_takes_over_the_training_mode() -> None:
    for training in (True, False):
        model = get_peft_model(kinds().train(training), config("plus", "lin"))
        assert model.base_model.model.lin.training == training


def test_other_layers_are_refused_with_their_name() -> None:
    base = kinds()
    with refused(base, ValueError, "'norm'", "LayerNorm", "Embedding", "modules_to_save"):
        get_peft_model(base, config("plus", "lin", "norm"))


def test_refused_second_adapter_leaves_the_first() -> None:
    model = adapted("plus", "lin", "conv")
    with refused(model, ValueError, "'norm'", "LayerNorm"):
        model.add_adapter("b", config("plus", "lin", "conv", "norm"))
    model.add_adapter("b", config("plus", "lin"))
    assert list(model.peft_config) == ["default", "b"]


@each_method
def test_requires_grad_is_set_by_name(method: str) -> None:
    model = adapted(method, "lin", adapters=("a", "b"))
    model.set_requires_grad("b")
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"a", "b"}
    model.set_requires_grad(["a", "b"], False)
    assert trainable(model) == set()
    model.set_requires_grad("unknown")
    assert trainable(model) == set()
    assert model.active_adapters == ["a"]


# ------------------------------------------------------------------------------------------ BufferDict
@pytest.mark.parametrize("persistent", [False, True])
def test_buffer_dict(persistent: bool) -> None:
    buffers = BufferDict({"a": torch.zeros(2)}, persistent=persistent)
    buffers["b"] = torch.ones(3)
    assert list(buffers) == ["a", "b"] and len(buffers) == 2 and "a" in buffers and "c" not in buffers
    assert list(buffers.state_dict()) == (["a", "b"] if persistent else [])
    assert buffers.to(torch.float64)["b"].dtype == torch.float64
    assert not list(buffers.parameters())
    assert "(a): (2,)" in repr(buffers)
    assert_equal(buffers.pop("b"), torch.ones(3, dtype=torch.float64))
    buffers.update({"c": torch.ones(1)})
    assert dict(buffers.items()).keys() == {"a", "c"} == set(buffers.keys()) and len(list(buffers.values())) == 2
    buffers.clear()
    assert not len(buffers)
    with pytest.raises(TypeError, match="cannot be called"):
        buffers(1)
