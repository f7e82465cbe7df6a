# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What holds for every method: method x kind of layer x type of the base weights x stage.

A cell is a model of two layers of one kind, with an adapter on both. Methods enter by being registered, with the kinds
of layers that they declare in `layer_classes`; what one needs to fit layers this small stands in
`support/method_options.py`. A kind that a method does not declare has to be refused. What a method does otherwise than
the others is listed below with its reason, and is tested to be so.
"""

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.effects import add_noise, rounding, size_that_matters
from support.helpers import refused, seeded
from support.method_options import OPTIONS, SECOND, is_mergeable, layered_methods
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import (
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.anatomy.walking import adapter_modules
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, ReplacementLayer


# strategies of methods that change what their layers compute
VARIANTS: dict[str, dict[str, Any]] = {
    "ADALORA-pruned": {"rank_pattern": {"one.lora_E": [True, False], "two.lora_E": [False, True]}},
    "IA3-feedforward": {"feedforward_modules": ["one", "two"]},
    "LOHA-effective": {"use_effective_conv2d": True},
    "LOKR-both": {"decompose_both": True, "use_effective_conv2d": True},
    "LORA-bias": {"lora_bias": True},
    "LORA-dora": {"use_dora": True},
    "LORA-rslora": {"use_rslora": True},
    "OFT-shared": {"block_share": True},
    "OFT-coft": {"coft": True, "eps": 0.5},
    "OFT-inverse": {"use_cayley_neumann": False},
}


@dataclass(frozen=True)
class Kind:
    """A kind of base layer: how one is made, and the shape of a batch of four inputs."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(16, 12), (4, 3, 16)),
    "linear_no_bias": Kind(lambda: nn.Linear(16, 12, bias=False), (4, 16)),
    "embedding": Kind(lambda: nn.Embedding(20, 16), (4, 3)),
    "transposed_linear": Kind(lambda: Conv1D(12, 16), (4, 3, 16)),
    "conv1d": Kind(lambda: nn.Conv1d(8, 12, 3, padding=1), (4, 8, 6)),
    "conv1d_grouped": Kind(lambda: nn.Conv1d(8, 12, 3, groups=2), (4, 8, 6)),
    "conv1d_dilated": Kind(lambda: nn.Conv1d(8, 12, 3, dilation=2, padding="same"), (4, 8, 6)),
    "conv2d": Kind(lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (4, 8, 5, 6)),
    "conv2d_pointwise": Kind(lambda: nn.Conv2d(8, 12, 1, bias=False), (4, 8, 5, 6)),
    "conv2d_grouped": Kind(lambda: nn.Conv2d(8, 12, (3, 1), groups=2), (4, 8, 5, 6)),
    "conv2d_dilated": Kind(lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2, padding_mode="circular"), (4, 8, 5, 6)),
    "conv3d": Kind(lambda: nn.Conv3d(8, 12, (1, 2, 3)), (4, 8, 2, 3, 4)),
    "conv3d_grouped": Kind(lambda: nn.Conv3d(8, 12, (1, 2, 3), groups=2, dilation=(1, 2, 1)), (4, 8, 2, 3, 4)),
    "attention": Kind(lambda: nn.MultiheadAttention(16, 2, batch_first=True), (4, 3, 16)),
    "layer_norm": Kind(lambda: nn.LayerNorm(16), (4, 3, 16)),
    "rms_norm": Kind(lambda: nn.RMSNorm(16), (4, 3, 16)),
    "group_norm": Kind(lambda: nn.GroupNorm(2, 8), (4, 8, 6)),
    "batch_norm": Kind(lambda: nn.BatchNorm1d(8), (4, 8, 6)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what the default run has, of methods and of variants
ALWAYS_WITH_VARIANTS = {("linear", "float32"), ("conv2d_grouped", "float32"), ("attention", "float32")}
ALWAYS = ALWAYS_WITH_VARIANTS | {("linear", "bfloat16")}
ALWAYS |= {(kind, "float32") for kind in ("embedding", "transposed_linear", "conv1d", "conv2d", "conv3d")}
ALWAYS |= {("layer_norm", "float32")}


class Two(nn.Module):
    """Two layers of one kind, of other weights, side by side."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.one, self.two = kind.make(), kind.make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the outputs of both, a row per sample."""
        attends = isinstance(unwrapped(self.one), nn.MultiheadAttention)
        outputs = [layer(x, x, x)[0] if attends else layer(x) for layer in (self.one, self.two)]
        return torch.cat([output.flatten(1) for output in outputs], dim=1)


def unwrapped(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


@functools.cache
def base(kind: str, dtype: torch.dtype) -> nn.Module:
    """Build a base model once; whoever changes it takes a copy."""
    with seeded():
        model = Two(KINDS[kind]).eval()
        for name, tensor in model.named_parameters():
            nn.init.normal_(tensor, mean=1.0 if "norm" in kind and name.endswith("weight") else 0.0, std=0.4)
    return model.to(dtype)


def inputs(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Give a batch of four samples."""
    with seeded(1):
        shape = KINDS[kind].inputs
        return torch.randint(0, 20, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


@dataclass(frozen=True)
class Cell:
    """One method, or a variant of one, on one kind of layer."""

    method: str
    kind: str
    type_name: str

    @property
    def name(self) -> str:
        """The method, without the variant."""
        return self.method.partition("-")[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base weights."""
        return DTYPES[self.type_name]

    @property
    def tuner_cls(self) -> type[BaseTuner]:
        """Class of the method's model."""
        return PEFT_TYPE_TO_TUNER_MAPPING[self.name]

    @property
    def base(self) -> nn.Module:
        """The base model, not to be changed."""
        return base(self.kind, self.dtype)

    def is_declared(self) -> bool:
        """Say whether the method declares this kind."""
        return isinstance(KINDS[self.kind].make(), tuple(self.tuner_cls.layer_classes))

    def has_layout(self) -> bool:
        """Say whether the config has a field for how weights are stored."""
        return "fan_in_fan_out" in PEFT_TYPE_TO_CONFIG_MAPPING[self.name].__dataclass_fields__

    def is_mergeable(self) -> bool:
        """Say whether there is a weight for what the method does."""
        return is_mergeable(self.name) and not self.exception(NOT_MERGEABLE)

    def is_usual(self) -> bool:
        """Say whether the cell is part of the default run; the others are much of the same."""
        return (self.kind, self.type_name) in (ALWAYS if self.method == self.name else ALWAYS_WITH_VARIANTS)

    def exception(self, table: dict[tuple[str, str], Any]) -> Any:
        """Look the cell up in a table of exceptions, by (method or variant, kind); "*" stands for every kind."""
        keys = [(m, k) for m in (self.method, self.name) for k in (self.kind, "*")]
        return next((table[key] for key in keys if key in table), None)

    def config(self, **changes: Any) -> Any:
        """Make the config, with what the method needs."""
        values = {"target_modules": ["one", "two"], **OPTIONS.get(self.name, {}), **VARIANTS.get(self.method, {})}
        if self.has_layout():
            values["fan_in_fan_out"] = self.kind == "transposed_linear"
        return PEFT_TYPE_TO_CONFIG_MAPPING[self.name](**{**values, **changes})

    def fresh(self, **options: Any) -> PeftModel:
        """Put an adapter into a new model, in eval mode."""
        changes = {name: options.pop(name) for name in list(options) if is_dropout(name)}
        with seeded(4):
            return get_peft_model(copy.deepcopy(self.base), self.config(**changes), **options).eval()

    def adapted(self, **options: Any) -> PeftModel:
        """Put an adapter into a new model, and move its tensors so far that it matters."""
        return self.moved(self.fresh(**options))

    def moved(self, model: PeftModel, adapter: str = "default", seed: int = 2) -> PeftModel:
        """Move an adapter's tensors by noise that changes what the model computes by about a tenth."""
        add_noise(adapter_tensors(model, adapter).values(), noise(self), seed)
        return model

    def with_second(self) -> PeftModel:
        """Put another adapter beside that."""
        model = self.adapted()
        self.add_second(model)
        return self.moved(model, "other", seed=3)

    def add_second(self, model: PeftModel) -> None:
        """Put another adapter beside the first one."""
        with seeded(6):
            model.add_adapter("other", self.config(**SECOND.get(self.name, {})))

    def outputs(self, model: nn.Module, **options: Any) -> torch.Tensor:
        """Run a model."""
        with torch.no_grad():
            return model(inputs(self.kind, self.dtype), **options)

    def assert_near(self, a: torch.Tensor, b: torch.Tensor, changes: int = 1) -> None:
        """Compare relative to the greatest entry."""
        scale = b.double().abs().max().clamp(min=1).item()
        torch.testing.assert_close(a.double() / scale, b.double() / scale, atol=rounding(self.dtype, changes), rtol=0)

    def assert_near_after_changes(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compare what was computed with a weight that was changed and rounded twice, which half precision shows."""
        self.assert_near(a, b, changes=2)

    def differs(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Say whether outputs differ by more than rounding does."""
        return bool((a.double() - b.double()).abs().max() > rounding(self.dtype) * b.double().abs().max())


@functools.cache
def noise(cell: Cell) -> float:
    """Find once by how much the tensors of the adapters of a cell are moved."""
    model = cell.fresh()
    return size_that_matters(adapter_tensors(model).values(), lambda: cell.outputs(model))


# ------------------------------------------------------------------------------------------ what is otherwise
# (method or variant, kind) -> what the refusal of the combination has to say
REFUSED: dict[tuple[str, str], str] = {
    **{(method, "conv2d_grouped"): "groups" for method in ("BOFT", "HRA", "OFT")},
    ("LORA-bias", "embedding"): "lora_bias",
    ("LORA-dora", "attention"): "DoRA",
}
# what only exists unmerged: factor B mixes the groups of a convolution, and a bias needs one to be merged into
NOT_MERGEABLE = {
    **{("LORA", f"conv{n}d_grouped"): "groups" for n in (1, 2, 3)},
    **{("LORA-bias", kind): "no bias" for kind in ("linear_no_bias", "conv2d_pointwise")},
    ("BEFT", "linear_no_bias"): "no bias",
}
# methods whose fresh adapter is not the identity, since all of their tensors come from a bank or a vector
NOT_IDENTITY = {("VBLORA", "*"): "bank", ("UNILORA", "*"): "vector"}
# where dropout has no effect: token ids cannot be dropped, nor the inputs of attention for the adapter alone
NO_DROPOUT = {
    ("HIRA", "embedding"): "ids",
    ("LORA", "embedding"): "ids",
    ("LORA", "attention"): "cannot be dropped",
    ("LN_TUNING", "batch_norm"): "outputs are others in training anyway",
    ("POLY", "*"): "mixtures are drawn while training",
    ("OFT-shared", "*"): "the one block that all inputs share is never left out",
}
# adapters whose tensors are copies of the base's, and so of its type
OF_BASE_TYPE = {("LN_TUNING", "*"): "copy"}
# adapters that cannot be mixed in a batch: their outputs are no sum of terms, or not one tensor
NO_MIXED_BATCH = {("LORA-dora", "*"): "DoRA", ("LN_TUNING", "attention"): "MultiheadAttention"}
# stages that merge
MERGING = ("merge", "unmerge", "two_active", "one_of_two_merged", "change_while_merged", "cast_while_merged", "delete")
# warnings that say what is tested here
EXPECTED_WARNINGS = (
    "an adapter on a convolution with 2 groups cannot be merged",
    "lora_dropout=0.5 has no effect",
    "lora_bias=True trains biases for .* which have none in the base model",
    "BEFT was given layers without a bias",
)


# ------------------------------------------------------------------------------------------ looking at models
def layers_of(model: nn.Module) -> list[BaseTunerLayer]:
    """Give the adapter layers."""
    return [module for _, module in adapter_modules(model) if isinstance(module, BaseTunerLayer)]


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[int, nn.Parameter]:
    """Give the parameters of an adapter that can be trained, by id."""
    found = {id(p): p for layer in layers_of(model) for p in layer.adapter_parameters(adapter)}
    return {key: p for key, p in found.items() if p.is_floating_point()}


# ------------------------------------------------------------------------------------------ stages
def identity(cell: Cell, folder: Path) -> None:
    """A fresh adapter changes nothing."""
    outputs, before = cell.outputs(cell.fresh()), cell.outputs(cell.base)
    assert outputs.dtype == before.dtype
    if cell.exception(NOT_IDENTITY):
        assert not torch.equal(outputs, before)
    else:
        cell.assert_near(outputs, before)


def effect(cell: Cell, folder: Path) -> None:
    """An adapter with other values changes something."""
    outputs = cell.outputs(cell.adapted())
    assert outputs.isfinite().all()
    assert cell.differs(outputs, cell.outputs(cell.base))


def merge(cell: Cell, folder: Path) -> None:
    """Merged equals unmerged, with and without layers; a merge with `safe_merge` does as well."""
    model = cell.adapted()
    expected = cell.outputs(model)
    model.merge_adapter()
    assert all(layer.merged and layer.merged_adapters == ["default"] for layer in layers_of(model))
    cell.assert_near(cell.outputs(model), expected)
    for options in ({}, {"safe_merge": True}):
        merged = cell.adapted().merge_and_unload(**options)
        assert type(merged) is Two and not layers_of(merged)
        assert set(merged.state_dict()) == set(cell.base.state_dict())
        cell.assert_near(cell.outputs(merged), expected)


def unmerge(cell: Cell, folder: Path) -> None:
    """Unmerging restores the base, bit for bit where a copy of it was kept."""
    model = cell.adapted()
    expected = cell.outputs(model)
    held = {id(p) for p in model.parameters()}
    kept = all(not layer.can_unmerge("default") for layer in layers_of(model))
    model.merge_adapter()
    model.unmerge_adapter()
    assert {id(p) for p in model.parameters()} == held
    assert not any(layer.merged for layer in layers_of(model))
    cell.assert_near(cell.outputs(model), expected)
    bare = model.unload()
    for key, tensor in bare.state_dict().items():
        if kept or tensor.dtype == torch.long:
            assert torch.equal(tensor, cell.base.state_dict()[key]), key
        else:
            cell.assert_near(tensor, cell.base.state_dict()[key])


def two_active(cell: Cell, folder: Path) -> None:
    """Two adapters at once: they are not one of them, and merged equals unmerged too."""
    model = cell.with_second()
    first = cell.outputs(model)
    model.set_adapter("other")
    second = cell.outputs(model)
    assert cell.differs(second, first)
    model.base_model.set_adapter(["default", "other"])
    both = cell.outputs(model)
    if issubclass(cell.tuner_cls.tuner_layer_cls, ReplacementLayer):  # the last one counts
        assert torch.equal(both, second)
    else:
        assert cell.differs(both, first) and cell.differs(both, second)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers_of(model))
    cell.assert_near(cell.outputs(model), both)
    model.unmerge_adapter()
    cell.assert_near(cell.outputs(model), both)
    cell.assert_near(cell.outputs(model.merge_and_unload()), both)


def one_of_two_merged(cell: Cell, folder: Path) -> None:
    """Of two active adapters one is merged, and the other one goes on counting; then the other way round."""
    model = cell.with_second()
    model.base_model.set_adapter(["default", "other"])
    both = cell.outputs(model)
    for names in (["default", "other"], ["other", "default"]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(not|nothing to|already) merge", PeftWarning)
            warnings.filterwarnings("ignore", "no adapter is merged", PeftWarning)
            for name in names:
                model.merge_adapter([name])
                cell.assert_near_after_changes(cell.outputs(model), both)
            model.unmerge_adapter()
        cell.assert_near_after_changes(cell.outputs(model), both)


def change_while_merged(cell: Cell, folder: Path) -> None:
    """Other tensors are loaded into an adapter that is merged: it computes with them, and unmerging finds the base."""
    model, other = cell.adapted(), cell.moved(cell.adapted(), seed=7)
    model.merge_adapter()
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    cell.assert_near_after_changes(cell.outputs(model), cell.outputs(other))
    model.unmerge_adapter()
    cell.assert_near_after_changes(cell.outputs(model), cell.outputs(other))
    cell.assert_near_after_changes(cell.outputs(model.unload()), cell.outputs(cell.base))


def cast_while_merged(cell: Cell, folder: Path) -> None:
    """A merged model is cast: what was kept for unmerging is cast with it."""
    model = cell.adapted()
    kept = all(not layer.can_unmerge("default") for layer in layers_of(model))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    bare = model.unload()
    for key, tensor in cell.base.state_dict().items():
        found = bare.state_dict()[key]
        assert found.dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)
        if kept:
            assert torch.equal(found, tensor.to(found.dtype)), key
        else:
            cell.assert_near_after_changes(found, tensor)


def disable(cell: Cell, folder: Path) -> None:
    """Switched off, the model is the base, bit for bit; also `unload` gives the base back."""
    model = cell.adapted()
    expected, before = cell.outputs(model), cell.outputs(cell.base)
    with model.disable_adapter():
        assert torch.equal(cell.outputs(model), before)
    assert torch.equal(cell.outputs(model), expected)
    bare = model.unload()
    assert torch.equal(cell.outputs(bare), before)
    assert set(bare.state_dict()) == set(cell.base.state_dict())


def save_and_load(cell: Cell, folder: Path) -> None:
    """What was saved is loaded without a difference, also over tensors without storage, and under another name."""
    model = cell.adapted()
    expected = cell.outputs(model)
    model.save_pretrained(folder)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(copy.deepcopy(cell.base), folder, **options).eval()
        assert torch.equal(cell.outputs(again), expected)
        assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert set(again.state_dict()) == set(model.state_dict())
    result = again.load_adapter(folder, "again")
    assert not result.unexpected_keys
    again.set_adapter("again")
    assert torch.equal(cell.outputs(again), expected)


def copies(cell: Cell, folder: Path) -> None:
    """A copy computes the same, and is one: what changes it leaves the original alone."""
    model = cell.adapted()
    expected = cell.outputs(model)
    again = copy.deepcopy(model)
    assert torch.equal(cell.outputs(again), expected)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in again.parameters())
    cell.moved(again, seed=5)
    assert cell.differs(cell.outputs(again), expected)
    assert torch.equal(cell.outputs(model), expected)


def nothing_is_stale(cell: Cell, folder: Path) -> None:
    """What one call has computed is not used in the next one where it no longer holds, however tensors are written."""
    model = cell.adapted()
    with torch.inference_mode():
        before = model(inputs(cell.kind, cell.dtype))
    model(inputs(cell.kind, cell.dtype)).float().sum().backward()  # autograd cannot keep what inference mode has made
    cell.moved(model, seed=8)  # in a way that torch does not count
    assert cell.differs(cell.outputs(model), before)
    assert torch.equal(cell.outputs(model), cell.outputs(pickle.loads(pickle.dumps(model))))
    for parameter in (p for p in model.parameters() if not p.requires_grad and p.is_floating_point()):
        parameter.data.mul_(1.25)
    assert torch.equal(cell.outputs(model), cell.outputs(pickle.loads(pickle.dumps(model))))


def functional(cell: Cell, folder: Path) -> None:
    """A call with other tensors in the places of an adapter's: `functional_call`, `grad`, and `vmap` over adapters."""
    model, x = cell.adapted(), inputs(cell.kind, cell.dtype)
    before = {name: id(p) for name, p in model.named_parameters()}
    own = {name: p for name, p in model.named_parameters() if id(p) in adapter_tensors(model)}
    (model(x).float() ** 2).sum().backward()
    gradients = {name: p.grad for name, p in own.items()}
    one = {name: p.detach().clone() for name, p in own.items()}
    two = {name: tensor * 1.2 + 0.01 for name, tensor in one.items()}
    given = {name: tensor.clone() for name, tensor in two.items()}

    def call(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, tensors, (x,))

    with torch.no_grad():
        outputs = [call(tensors) for tensors in (one, two)]
    for name, gradient in torch.func.grad(lambda tensors: (call(tensors).float() ** 2).sum())(one).items():
        cell.assert_near(gradient, gradients[name])
    stacked = {name: torch.stack([one[name], two[name]]) for name in one}
    for together, alone in zip(torch.func.vmap(call)(stacked), outputs, strict=True):
        cell.assert_near(together, alone)
    assert all(torch.equal(two[name], tensor) for name, tensor in given.items())
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(cell.outputs(model), outputs[0])
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(two[name])
    cell.assert_near(outputs[1], cell.outputs(model))


class TensorCollector(pickle.Pickler):
    """A pickler that notes every tensor it meets, as often as it would write it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.tensors: dict[int, torch.Tensor] = {}

    def persistent_id(self, value: Any) -> str | None:
        """Note tensors and write nothing in their place but a number."""
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors[id(value)] = value
        return str(id(value))


def pickled_once(cell: Cell, folder: Path) -> None:
    """A pickle has the model's tensors and no others, each once, and what is shared is shared again."""
    model = cell.with_second()
    expected = cell.outputs(model)
    collector = TensorCollector()
    collector.dump(model)
    met = [t.data_ptr() for t in collector.tensors.values() if t.numel()]
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert len(met) == len(set(met)), "a tensor is reached by two objects"
    assert set(met) == held, "a pickle holds tensors that the model does not have"
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(cell.outputs(again), expected)
    for kind in ("parameters", "buffers"):
        assert len(list(getattr(again, kind)())) == len(list(getattr(model, kind)()))


def delete(cell: Cell, folder: Path) -> None:
    """A deleted adapter leaves nothing behind, and the other one as it was."""
    model = cell.adapted()
    expected, keys = cell.outputs(model), set(model.state_dict())
    cell.add_second(model)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        model.delete_adapter("other")
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"] == model.active_adapters
    for layer in layers_of(model):
        assert not layer.has_adapter("other") and layer.active_adapters == ["default"]
        for name in (*layer.adapter_layer_names, *layer.other_param_names, *layer.shared_layer_names):
            container = getattr(layer, name, None)
            assert not hasattr(container, "keys") or "other" not in container.keys(), name
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(adapter_tensors(model))
    cell.assert_near(cell.outputs(model), expected)


def gradients(cell: Cell, folder: Path) -> None:
    """Gradients reach the adapter's tensors, all of them, and no others."""
    model = cell.with_second()
    own = adapter_tensors(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(own)
    model(inputs(cell.kind, cell.dtype)).float().pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert not parameter.numel() or parameter.grad.any(), name
    model.set_adapter("other")
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(adapter_tensors(model, "other"))
    model.base_model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def one_adapter_per_sample(cell: Cell, folder: Path) -> None:
    """Each sample of a batch gets the adapter that is named for it."""
    model = cell.with_second()
    names = ["other", "default", "__base__", "other"]
    if cell.exception(NO_MIXED_BATCH) or not all(layer.supports_mixed_batch for layer in layers_of(model)):
        with refused(model, (), "adapter_names", cell.exception(NO_MIXED_BATCH) or ""):
            cell.outputs(model, adapter_names=names)
        return
    each = {"default": cell.outputs(model), "__base__": cell.outputs(cell.base)}
    model.set_adapter("other")
    each["other"] = cell.outputs(model)
    model.set_adapter("default")
    mixed = cell.outputs(model, adapter_names=names)
    assert mixed.dtype == each["default"].dtype
    for row, name in enumerate(names):
        cell.assert_near(mixed[row], each[name][row])


def dropout(cell: Cell, folder: Path) -> None:
    """Each field for dropout acts in training and not in eval mode."""
    fields = [name for name in PEFT_TYPE_TO_CONFIG_MAPPING[cell.name].__dataclass_fields__ if is_dropout(name)]
    expected = cell.outputs(cell.adapted())
    for field in fields:
        model = cell.adapted(**{field: 0.5})
        assert torch.equal(cell.outputs(model), expected), field
        model.train()
        with seeded(7):
            drawn = [cell.outputs(model) for _ in range(8)]
        has_effect = any(not torch.equal(drawn[0], other) for other in drawn)
        assert has_effect == (not cell.exception(NO_DROPOUT)), field
        assert torch.equal(cell.outputs(model.eval()), expected), field
    if not fields and not cell.exception(NO_DROPOUT):
        model = cell.adapted().train()
        cell.assert_near(cell.outputs(model), expected)


def is_dropout(field: str) -> bool:
    return field.endswith("dropout")


def types(cell: Cell, folder: Path) -> None:
    """An adapter is kept in float32, unless the caller asks for the base's type."""
    for autocast in (True, False):
        wanted = torch.float32 if autocast and not cell.exception(OF_BASE_TYPE) else cell.dtype
        model = cell.fresh(autocast_adapter_dtype=autocast)
        assert {p.dtype for p in adapter_tensors(model).values()} == {wanted}
        assert cell.outputs(cell.moved(model)).dtype == cell.dtype
        assert {p.dtype for layer in layers_of(model) for p in held_by(unwrapped(layer))} <= {cell.dtype}


def held_by(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer._parameters.values() if parameter is not None]


STAGES: dict[str, Callable[[Cell, Path], None]] = {
    function.__name__: function
    for function in (
        identity,
        effect,
        merge,
        unmerge,
        two_active,
        one_of_two_merged,
        change_while_merged,
        cast_while_merged,
        disable,
        save_and_load,
        copies,
        nothing_is_stale,
        functional,
        pickled_once,
        delete,
        gradients,
        one_adapter_per_sample,
        dropout,
        types,
    )
}


# ------------------------------------------------------------------------------------------ the product
def cells() -> Iterator[Cell]:
    """Yield every method and variant with every kind of layer and every type."""
    known = layered_methods()
    for method in (*known, *(variant for variant in VARIANTS if variant.partition("-")[0] in known)):
        yield from (Cell(method, kind, type_name) for kind in KINDS for type_name in DTYPES)


def parameter(cell: Cell, *others: Any) -> Any:
    """Name a test; what is not in the default slice is marked."""
    marks = [] if cell.is_usual() else [pytest.mark.wide]
    return pytest.param(cell, *others, id="-".join([cell.method, cell.kind, cell.type_name, *others]), marks=marks)


def working_cells() -> list[Any]:
    working = [cell for cell in cells() if cell.is_declared() and not cell.exception(REFUSED)]
    return [
        parameter(cell, stage) for cell in working for stage in STAGES if cell.is_mergeable() or stage not in MERGING
    ]


def refused_cells() -> list[Any]:
    return [parameter(cell) for cell in cells() if cell.is_declared() and cell.exception(REFUSED)]


def unmergeable_cells() -> list[Any]:
    return [parameter(cell) for cell in cells() if cell.is_declared() and not cell.is_mergeable()]


def undeclared_cells() -> list[Any]:
    """Kinds that a method does not declare; variants and types make no difference there."""
    return [
        parameter(cell)
        for cell in cells()
        if not cell.is_declared() and cell.method == cell.name and cell.type_name == "float32"
    ]


def cells_with_layout() -> list[Any]:
    """Linear layers of methods whose configs say in which of two ways weights are stored."""
    plain = [cell for cell in cells() if cell.is_declared() and cell.method == cell.name]
    return [
        parameter(cell)
        for cell in plain
        if cell.kind in ("linear", "transposed_linear") and cell.type_name == "float32" and cell.has_layout()
        if cell.name != "HIRA"  # whose field has no effect, as in the release
    ]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """Nothing warns, but for what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        for text in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", text, PeftWarning)
        yield


@pytest.mark.parametrize(("cell", "stage"), working_cells())
def test_method(cell: Cell, stage: str, tmp_path: Path) -> None:
    STAGES[stage](cell, tmp_path)


@pytest.mark.parametrize("cell", refused_cells())
def test_combination_is_refused(cell: Cell) -> None:
    model = copy.deepcopy(cell.base)
    with refused(model, (), cell.exception(REFUSED)):
        get_peft_model(model, cell.config())


@pytest.mark.parametrize("cell", unmergeable_cells())
def test_merging_is_refused(cell: Cell) -> None:
    model = cell.adapted()
    for merging in (model.merge_adapter, model.merge_and_unload):
        with refused(model, (), cell.exception(NOT_MERGEABLE) or "depends on the call"):
            merging()


@pytest.mark.parametrize("cell", cells_with_layout())
def test_layout_is_read_from_the_layers(cell: Cell) -> None:
    right = cell.kind == "transposed_linear"
    config = cell.config(fan_in_fan_out=not right)
    with pytest.warns(PeftWarning, match=f"fan_in_fan_out={not right} does not fit .*; {right} is used"):
        model = get_peft_model(copy.deepcopy(cell.base), config)
    assert (model.peft_config["default"].fan_in_fan_out, config.fan_in_fan_out) == (right, not right)


@pytest.mark.parametrize("cell", undeclared_cells())
def test_kind_is_refused(cell: Cell) -> None:
    model = copy.deepcopy(cell.base)
    with refused(model, TypeError, "'one'", type(model.one).__name__):
        get_peft_model(model, cell.config())


def test_exceptions_are_used() -> None:
    """No entry of the tables above is left over."""
    everything = [cell for cell in cells() if cell.is_declared()]
    for table in (REFUSED, NOT_MERGEABLE, NOT_IDENTITY, NO_DROPOUT, OF_BASE_TYPE, NO_MIXED_BATCH):
        for method, kind in table:
            assert any(method in (cell.method, cell.name) and kind in (cell.kind, "*") for cell in everything)
