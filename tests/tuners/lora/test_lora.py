# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA: every kind of layer, with every option, at every stage of an adapter's life.

What a stage should give is computed by hand: the plain base model, with W + scaling * B A put into its weights.
"""

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import (
    Kinds,
    ScaledEmbedding,
    assert_close,
    assert_equal,
    differs,
    gpt2,
    kinds,
    llama,
    logits,
    opt,
    randomise,
    refused,
    token_ids,
    trainable,
    warned,
)
from torch import nn
from torch.func import functional_call

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

KINDS = ("lin", "emb", "conv")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.5},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "patterns": {
        "rank_pattern": {"lin": 2, "^emb": 4, "c[o]nv": 5},
        "alpha_pattern": {"lin": 6, "^emb": 1, "c[o]nv": 9},
    },
}
CASES = [(kind, option) for kind in KINDS for option in OPTIONS if (kind, option) != ("emb", "lora_bias")]
IDS = token_ids(vocabulary=12)


# ------------------------------------------------------------------------------------------ by hand
@dataclass
class Case:
    """A kind of layer with an option: the config, and the same in plain torch."""

    kind: str
    option: str
    embedding: Callable[[], nn.Embedding] | None = None

    def base(self) -> Kinds:
        """A fresh base model; always the same."""
        return kinds(self.embedding() if self.embedding else None)

    def config(self, **changes: Any) -> LoraConfig:
        """The config under test."""
        options = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": self.kind == "conv", **OPTIONS[self.option]}
        return LoraConfig(**{"target_modules": [self.kind], **options, **changes})

    def fresh(self, **changes: Any) -> PeftModel:
        """An adapter as it starts."""
        return get_peft_model(self.base(), self.config(**changes)).eval()

    def trained(self, **changes: Any) -> PeftModel:
        """An adapter whose tensors all have an effect."""
        model = self.fresh(**changes)
        randomise(model)
        return model

    def rank(self, config: LoraConfig) -> int:
        """Rank of the factors."""
        return {"lin": 2, "emb": 4, "conv": 5}[self.kind] if config.rank_pattern else config.r

    def scaling(self, config: LoraConfig) -> float:
        """What the product of the factors is multiplied by."""
        alpha = {"lin": 6, "emb": 1, "conv": 9}[self.kind] if config.alpha_pattern else config.lora_alpha
        return alpha / (self.rank(config) ** (0.5 if config.use_rslora else 1))

    def factors(self, adapter: str = "default") -> list[str]:
        """Names of an adapter's tensors, below the adapted layer."""
        if self.kind == "emb":
            return [f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"]
        names = [f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"]
        return [*names, f"lora_B.{adapter}.bias"] if self.option == "lora_bias" else names

    def saved_keys(self) -> set[str]:
        """Keys of a checkpoint of the adapter."""
        return {f"base_model.model.{self.kind}.{name.replace('.default', '')}" for name in self.factors()}

    def layer(self, model: nn.Module) -> LoraLayer:
        """The adapted layer."""
        return model.get_submodule(f"base_model.model.{self.kind}" if isinstance(model, PeftModel) else self.kind)

    def effective(self, *parts: tuple[LoraConfig, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Weight and bias of the layer with adapters put in: the formula of the paper."""
        tensors = dict(self.base().get_submodule(self.kind).named_parameters())
        for config, (a, b, *bias) in parts:
            delta = self.scaling(config) * (b @ a)  # (out, in)
            tensors["weight"] = tensors["weight"] + (delta if self.kind == "lin" else delta.T)
            if bias:
                tensors["bias"] = tensors["bias"] + self.scaling(config) * bias[0]
        return {f"{self.kind}.{name}": tensor for name, tensor in tensors.items()}

    def reference(self, *parts: tuple[LoraConfig, list[torch.Tensor]]) -> torch.Tensor:
        """Output of the plain base model with those tensors."""
        return functional_call(self.base(), self.effective(*parts), (IDS,))

    def expected(self, model: nn.Module, *adapters: str, **changes: Any) -> torch.Tensor:
        """What a model with these adapters should compute."""
        layer = self.layer(model)
        read = [(a, [layer.get_parameter(name).detach().float() for name in self.factors(a)]) for a in adapters]
        with torch.no_grad():
            return self.reference(*[(self.config(**changes.get(name, {})), tensors) for name, tensors in read])


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind with each option."""
    return Case(*request.param)


@pytest.fixture(params=KINDS)
def plain(request: pytest.FixtureRequest) -> Case:
    """Each kind with the default options."""
    return Case(request.param, "default")


# ------------------------------------------------------------------------------------------ start
def test_fresh_adapter(case: Case) -> None:
    expected = logits(case.base(), IDS)
    model = case.fresh()
    if case.option == "random":
        assert differs(logits(model, IDS), expected)
    else:
        assert_equal(logits(model, IDS), expected)
    layer = case.layer(model)
    assert type(layer) is (Embedding if case.kind == "emb" else Linear)
    assert model.targeted_module_names == [case.kind]
    assert layer.scaling["default"] == pytest.approx(case.scaling(case.config()))
    a, b = layer.factor_weights("default")
    assert a.shape == (case.rank(case.config()), layer.in_features)
    assert b.shape == (layer.out_features, case.rank(case.config()))


@pytest.mark.parametrize(
    ("init", "std_of_a"),
    [(True, 1 / (3 * 400) ** 0.5), ("gaussian", 1 / 50), ("GAUSSIAN", 1 / 50), (None, 1 / (3 * 400) ** 0.5)],
)
def test_start_of_linear_factors(init: Any, std_of_a: float) -> None:
    """Uniform in +-1/sqrt(in) has a deviation of 1/sqrt(3 in); the normal start has one of 1/r."""
    net = nn.Sequential(nn.Linear(400, 300))
    layer = get_peft_model(net, LoraConfig(r=50, target_modules=["0"], init_lora_weights=init)).base_model.model[0]
    a, b = layer.factor_weights("default")
    assert a.std().item() == pytest.approx(std_of_a, rel=0.05) and abs(a.mean().item()) < std_of_a / 20
    assert not b.any()
    if init is True:
        assert a.abs().max().item() <= 1 / 20


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_start_of_embedding_factors(init: Any) -> None:
    net = nn.Sequential(nn.Embedding(300, 200))
    layer = get_peft_model(net, LoraConfig(r=50, target_modules=["0"], init_lora_weights=init)).base_model.model[0]
    a, b = layer.factor_weights("default")
    assert not a.any()
    assert b.std().item() == pytest.approx(1.0, rel=0.05)


def test_starting_anew(plain: Case) -> None:
    model = plain.trained()
    expected = logits(plain.base(), IDS)
    assert differs(logits(model, IDS), expected)
    plain.layer(model).reset_lora_parameters("default", True)
    assert_equal(logits(model, IDS), expected)


# ------------------------------------------------------------------------------------------ forward and backward
def test_forward(case: Case) -> None:
    model = case.trained()
    expected = case.expected(model, "default")
    assert differs(expected, logits(case.base(), IDS))
    assert_close(logits(model, IDS), expected)


def test_gradients(case: Case) -> None:
    """They reach exactly what is trained, and are those of the formula."""
    model = case.trained()
    names = [f"base_model.model.{case.kind}.{name}" for name in case.factors()]
    biases = {
        "bias_all": [n for n, _ in model.named_parameters() if n.endswith(".bias") and "lora_" not in n],
        "bias_lora_only": [f"base_model.model.{case.kind}.base_layer.bias"] if case.kind != "emb" else [],
    }.get(case.option, [])
    assert trainable(model) == {*names, *biases}
    model(IDS).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {*names, *biases}

    leaves = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    case.reference((case.config(), leaves)).square().sum().backward()
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad.abs().max() > 1e-3
        assert_close(model.get_parameter(name).grad, leaf.grad, atol=1e-4)


def test_dropout_works_in_training_only(plain: Case) -> None:
    model = Case(plain.kind, "dropout").trained()
    expected = logits(model, IDS)
    assert_equal(logits(model, IDS), expected)
    model.train()
    first, second = logits(model, IDS), logits(model, IDS)
    if plain.kind == "emb":  # dropping token ids has no meaning
        assert_equal(first, expected)
    else:
        assert differs(first, second) and differs(first, expected)


def test_dropout_is_in_front_of_factor_a() -> None:
    """With an input of ones, each sample keeps a random half of A's columns, doubled."""
    net = nn.Sequential(nn.Linear(8, 3, bias=False))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0"], lora_dropout=0.5))
    randomise(model)
    layer = model.base_model.model[0]
    a, b = (w.detach() for w in layer.factor_weights("default"))
    with torch.no_grad():
        torch.manual_seed(3)
        output = model(torch.ones(4, 8)) - layer.base_layer(torch.ones(4, 8))
        torch.manual_seed(3)
        mask = nn.functional.dropout(torch.ones(4, 8), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert_close(output, mask @ a.T @ b.T)


def test_scaling_can_be_changed(plain: Case) -> None:
    model = plain.trained()
    layer, base, full = plain.layer(model), logits(plain.base(), IDS), logits(model, IDS)
    layer.scale_layer(2.0)
    assert layer.scaling["default"] == pytest.approx(10 / 3)
    doubled = logits(model, IDS)
    assert differs(doubled, full)
    layer.unscale_layer(2.0)
    assert_close(logits(model, IDS), full)
    layer.set_scale("default", 0.0)
    assert_close(logits(model, IDS), base)
    layer.set_scale("default", 2.0)
    assert_close(logits(model, IDS), doubled)
    layer.unscale_layer()
    assert_close(logits(model, IDS), full)
    layer.set_scale("unknown", 2.0)
    assert set(layer.scaling) == {"default"}


def test_batch_with_an_adapter_per_sample(case: Case) -> None:
    model = case.trained()
    model.add_adapter("b", case.config(r=2, bias="none"))
    randomise(model, "lora_", seed=7)
    rows = {
        "__base__": logits(case.base(), IDS),
        "default": case.expected(model, "default"),
        "b": case.expected(model, "b", b={"r": 2}),
    }
    for names in (["b", "default"], ["__base__", "b"], ["default", "default"], ["__base__", "__base__"]):
        expected = torch.stack([rows[name][i] for i, name in enumerate(names)])
        assert_close(logits(model, IDS, adapter_names=names), expected)


# ------------------------------------------------------------------------------------------ merging and unloading
def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base tensors, under the names that the bare base model has."""
    names = {name: name.replace("base_model.model.", "").replace(".base_layer", "") for name in model.state_dict()}
    return {names[n]: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(case: Case, safe_merge: bool) -> None:
    model = case.trained()
    before, expected = base_tensors(model), logits(model, IDS)
    layer = case.layer(model)
    effective = case.effective((case.config(), [layer.get_parameter(n).detach() for n in case.factors()]))
    model.merge_adapter(safe_merge=safe_merge)
    merged = base_tensors(model)
    assert layer.merged_adapters == ["default"]
    for name, tensor in effective.items():
        assert_close(merged[name], tensor.detach())
    assert_close(logits(model, IDS), expected)
    model.unmerge_adapter()
    assert not layer.merged
    for name, tensor in base_tensors(model).items():
        assert_close(tensor, before[name], atol=1e-6)
    assert_close(logits(model, IDS), expected)


def test_delta_weight_is_what_merging_adds(case: Case) -> None:
    model = case.trained()
    layer, before = case.layer(model), base_tensors(model)[f"{case.kind}.weight"]
    delta = layer.get_delta_weight("default").detach()
    assert delta.shape == before.shape
    layer.merge()
    assert_close(layer.weight.detach(), before + delta)


def test_merge_and_unload(case: Case) -> None:
    model = case.trained()
    expected, weight = logits(model, IDS), case.layer(model).get_base_weight()
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in case.base().modules()]
    assert list(merged.state_dict()) == list(case.base().state_dict())
    assert merged.get_submodule(case.kind).weight is weight, "the parameter object stays"
    assert_close(logits(merged, IDS), expected)


@pytest.mark.parametrize("progressbar", [False, True])
def test_progress_bar(capsys: pytest.CaptureFixture, progressbar: bool) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2))
    model.merge_and_unload(progressbar=progressbar)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("4/4" in err) == progressbar and bool(err) == progressbar


def test_merging_chosen_adapters(plain: Case) -> None:
    model = plain.trained()
    model.add_adapter("b", plain.config())
    randomise(model, "lora_", seed=7)
    before = base_tensors(model)
    model.merge_adapter(["b"])
    assert_close(logits(model, IDS), plain.expected(model, "b"))
    model.unmerge_adapter()
    with refused(model, TypeError, "adapter_names", "'default'", "list"):
        model.merge_adapter("default")
    with refused(model, TypeError, "adapter_names", "'default'", "list"):
        model.merge_and_unload(adapter_names="default")
    with warned("'not there'", "'default', 'b'"):
        model.merge_adapter(["not there"])
    for name, tensor in base_tensors(model).items():
        assert_close(tensor, before[name], atol=1e-6)
    expected = plain.expected(model, "b", "default")
    assert_close(logits(model.merge_and_unload(adapter_names=["b", "default"]), IDS), expected)


def test_unload(case: Case) -> None:
    model = case.trained()
    base = model.unload()
    assert [type(m) for m in base.modules()] == [type(m) for m in case.base().modules()]
    assert_equal(logits(base, IDS), logits(case.base(), IDS))
    for name, tensor in case.base().state_dict().items():
        assert_equal(base.state_dict()[name], tensor)


def test_lora_bias_needs_a_bias_to_merge_into() -> None:
    """A layer without a bias can never take it up, which is said when training starts, not when it has ended."""
    with warned("lora_bias", "'head'", "never be merged"):
        model = get_peft_model(kinds(), LoraConfig(target_modules=["lin", "head"], lora_bias=True))
    get_peft_model(kinds(), LoraConfig(target_modules=["lin"], lora_bias=True))
    randomise(model)
    for safe_merge in (False, True):
        with refused(model, RuntimeError, "lora_bias", "Linear", "unmerged"):
            model.merge_adapter(safe_merge=safe_merge)
    with refused(model, RuntimeError, "lora_bias"):
        model.merge_and_unload()


# ------------------------------------------------------------------------------------------ switching
def test_disabled(case: Case) -> None:
    model, expected = case.trained(), logits(case.base(), IDS)
    before, names = logits(model, IDS), trainable(model)
    if case.config().bias == "none":
        with model.disable_adapter():
            assert_equal(logits(model, IDS), expected)
            assert not any("lora_" in name for name in trainable(model))
    else:
        with warned("bias=", "default"):
            model.base_model.disable_adapter_layers()
        assert_equal(logits(model, IDS), expected)  # no bias has been trained yet
        model.base_model.enable_adapter_layers()
    assert_equal(logits(model, IDS), before)
    assert trainable(model) == names


def test_second_adapter(case: Case) -> None:
    model = case.trained()
    first = logits(model, IDS)
    model.add_adapter("b", case.config(r=2, lora_alpha=7, bias="none"))
    changes = {"b": {"r": 2, "lora_alpha": 7}}
    assert_equal(logits(model, IDS), first)  # a new adapter is not active
    randomise(model, r"lora_.*\.b\b", seed=7)
    assert_equal(logits(model, IDS), first)
    model.set_adapter("b")
    assert_close(logits(model, IDS), case.expected(model, "b", **changes))
    lora = {name for name in trainable(model) if "lora_" in name}
    assert lora == {f"base_model.model.{case.kind}.{name}" for name in case.factors("b")}
    model.base_model.set_adapter(["default", "b"])
    assert_close(logits(model, IDS), case.expected(model, "default", "b", **changes))
    model.set_adapter("default")
    assert_equal(logits(model, IDS), first)


def test_delete(case: Case) -> None:
    model = case.trained()
    model.add_adapter("b", case.config(bias="none"))
    randomise(model, r"lora_.*\.b\b", seed=7)
    with warned("'default' was deleted", "'b'"):
        model.delete_adapter("default")
    assert not any(".default" in key for key in model.state_dict())
    layer = case.layer(model)
    assert layer.available_adapters == {"b"} == set(layer.r) == set(layer.scaling) == set(layer.lora_dropout)
    assert_close(logits(model, IDS), case.expected(model, "b"))
    model.delete_adapter("b")
    assert_equal(logits(model, IDS), logits(case.base(), IDS))


# ------------------------------------------------------------------------------------------ saving and loading
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    model = case.trained()
    for name in trainable(model):
        randomise(model, f"^{re.escape(name)}$", seed=9)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in saved if "lora_" in key} == case.saved_keys()
    assert {key for key in saved if "lora_" not in key} == {name for name in trainable(model) if "lora_" not in name}

    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_close(logits(loaded, IDS), expected, atol=1e-6)
    assert not loaded.training and trainable(loaded) == set()
    again = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)
    assert {k: v.tolist() for k, v in get_peft_model_state_dict(again).items()} == {
        k: v.tolist() for k, v in saved.items()
    }


def test_low_cpu_mem_usage(case: Case, tmp_path: Path) -> None:
    model = case.trained()
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert_equal(logits(loaded, IDS), expected)
    if case.config().bias == "none":  # biases exist once, so a second adapter could not bring its own
        loaded.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
        loaded.set_adapter("b")
        assert_equal(logits(loaded, IDS), expected)


def test_tensors_without_storage(case: Case) -> None:
    model = get_peft_model(case.base(), case.config(), low_cpu_mem_usage=True)
    on_meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert on_meta == {f"base_model.model.{case.kind}.{name}" for name in case.factors()}
    source = case.trained()
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not result.unexpected_keys and not any("lora_" in key for key in result.missing_keys)
    assert trainable(model) == trainable(source)
    assert_equal(logits(model.eval(), IDS), logits(source, IDS))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injection_from_a_state_dict(case: Case, low_cpu_mem_usage: bool) -> None:
    """The keys say which modules are adapted; where the config targets others, that is said."""
    source = case.trained()
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(source).items()}
    config = case.config(target_modules=["lin", "conv", "emb"])
    with pytest.warns(RuntimeWarning, match="the state dict has no tensors for"):
        model = inject_adapter_in_model(config, case.base(), state_dict=tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == [case.kind]
    assert set_peft_model_state_dict(model, tensors).unexpected_keys == []
    assert_equal(logits(model.eval(), IDS), logits(source, IDS))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_stand_alone(case: Case, duplicate: Callable) -> None:
    model = case.trained()
    expected = logits(model, IDS)
    twin = duplicate(model)
    assert_equal(logits(twin, IDS), expected)
    assert trainable(twin) == trainable(model)
    randomise(twin, "lora_", seed=11)
    twin.merge_and_unload()
    assert_equal(logits(model, IDS), expected)


# ------------------------------------------------------------------------------------------ types
def test_half_precision_base(plain: Case) -> None:
    model = get_peft_model(plain.base().to(torch.bfloat16), plain.config()).eval()
    randomise(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    output = logits(model, IDS)
    assert output.dtype == torch.bfloat16
    expected = plain.expected(model, "default")
    assert_close(output.float(), expected, atol=0.1)
    model.merge_adapter()
    assert plain.layer(model).weight.dtype == torch.bfloat16
    assert_close(logits(model, IDS).float(), expected, atol=0.1)
    model.unmerge_adapter()
    assert_close(plain.layer(model).weight.float(), plain.base().get_submodule(plain.kind).weight.detach(), atol=0.02)


def test_half_precision_adapter(plain: Case, tmp_path: Path) -> None:
    base = plain.base().to(torch.bfloat16)
    model = get_peft_model(base, plain.config(), autocast_adapter_dtype=False).eval()
    model.add_adapter("b", plain.config(), autocast_adapter_dtype=False)
    model.add_adapter("c", plain.config())
    layer = plain.layer(model)
    types = {name: {p.dtype for p in layer.adapter_parameters(name)} for name in model.peft_config}
    assert types == {"default": {torch.bfloat16}, "b": {torch.bfloat16}, "c": {torch.float32}}
    randomise(model)
    assert differs(logits(model, IDS).float(), logits(plain.base(), IDS))
    assert_close(logits(model, IDS).float(), plain.expected(model, "default"), atol=0.15)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_merging_in_pieces_is_the_same(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of another type than the weight are multiplied some rows at a time."""
    monkeypatch.setattr("peft.tuners.lora.maths.MERGE_ROWS", 3)
    model = get_peft_model(plain.base().double(), plain.config()).eval()
    model.base_model.model.to(torch.float64)
    randomise(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    layer = plain.layer(model)
    expected = layer.weight.detach() + layer.get_delta_weight("default").detach()
    layer.merge()
    assert layer.weight.dtype == torch.float64
    assert_close(layer.weight.detach(), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------ embeddings
def test_scaled_embedding() -> None:
    """An embedding with a scale, such as Gemma's, scales what the adapter adds as well."""
    case = Case("emb", "default", embedding=lambda: ScaledEmbedding(12, 8, 4.0))
    model = case.trained()
    expected = case.expected(model, "default")
    assert differs(logits(model, IDS), Case("emb", "default").expected(model, "default"))
    assert_close(logits(model, IDS), expected)
    assert_close(logits(model, IDS, adapter_names=["default", "default"]), expected)
    with model.disable_adapter():
        assert_equal(logits(model, IDS), logits(case.base(), IDS))
    assert_close(logits(model.merge_and_unload(), IDS), expected)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str)
def test_options_of_an_embedding(options: dict[str, Any]) -> None:
    """An adapter learns what the base layer would learn, and computing changes none of its tensors."""
    case = Case("emb", "default", embedding=lambda: nn.Embedding(12, 8, **options))
    model = case.trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    output = model(IDS)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    if "max_norm" not in options:
        assert_close(output.detach(), case.expected(model, "default"))
    output.square().sum().backward()
    a = case.layer(model).lora_embedding_A["default"]
    used = a.grad.abs().sum(0) > 0
    assert used.any() and set(used.nonzero().flatten().tolist()) <= set(IDS.flatten().tolist()) - {
        options.get("padding_idx")
    }


# ------------------------------------------------------------------------------------------ settings and refusals
def test_layout_is_read_from_the_layer() -> None:
    with warned("fan_in_fan_out=False", "(in, out)", "True"):
        model = get_peft_model(gpt2(), LoraConfig(r=2))
    assert model.peft_config["default"].fan_in_fan_out is True
    with warned("fan_in_fan_out=True", "(out, in)", "False"):
        model = get_peft_model(llama(), LoraConfig(r=2, fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out is False


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_layers_of_both_layouts(fan_in_fan_out: bool) -> None:
    """Where a model has both, each layer is read as it is, and no value of the field is wrong."""
    names = ["conv", "lin", "head"]
    model = get_peft_model(kinds(), LoraConfig(target_modules=names, fan_in_fan_out=fan_in_fan_out))
    randomise(model)
    expected = logits(model, IDS)
    assert_close(logits(model.merge_and_unload(), IDS), expected)


@pytest.mark.parametrize(
    ("kwargs", "classes", "mentions"),
    [
        ({"r": 0}, ValueError, ("positive", "0")),
        ({"r": -1}, ValueError, ("positive", "-1")),
        ({"r": 2.5}, ValueError, ("positive", "2.5")),
        ({"rank_pattern": {"lin": 0}}, ValueError, ("positive", "0")),
        ({"init_lora_weights": "warm"}, ValueError, ("init_lora_weights", "warm", "gaussian")),
        ({"bias": "some"}, NotImplementedError, ("bias='some'", "none", "all", "lora_only")),
        ({"megatron_config": {"a": 1}}, ImportError, ("megatron_config", "megatron.core")),
        ({"target_modules": ["emb"], "lora_bias": True}, ValueError, ("lora_bias", "embedding")),
        ({"target_modules": ["conv", "norm"]}, ValueError, ("'norm'", "LayerNorm", "modules_to_save")),
        ({"target_modules": None}, ValueError, ("target_modules", "all-linear")),
    ],
    ids=str,
)
def test_values_that_cannot_work(kwargs: dict[str, Any], classes: type, mentions: tuple[str, ...]) -> None:
    base = kinds()
    with refused(base, classes, *mentions):
        get_peft_model(base, LoraConfig(**{"target_modules": ["conv", "lin"], "fan_in_fan_out": True, **kwargs}))
    model = get_peft_model(base, LoraConfig(target_modules=["conv"], fan_in_fan_out=True))
    with refused(model, classes, *mentions):
        model.add_adapter("b", LoraConfig(**{"target_modules": ["conv", "lin"], "fan_in_fan_out": True, **kwargs}))


def test_biases_can_be_trained_by_one_adapter_only() -> None:
    model = get_peft_model(opt(), LoraConfig(r=2, bias="all"))
    with refused(model, ValueError, "bias='lora_only'", "'default'", "'b'"):
        model.add_adapter("b", LoraConfig(r=2, bias="lora_only"))
    model.add_adapter("b", LoraConfig(r=2))
    assert list(model.peft_config) == ["default", "b"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_stay_trainable(bias: str) -> None:
    """Whatever is added, switched off or frozen meanwhile, the adapter that trains biases goes on to do so."""
    model = get_peft_model(opt(), LoraConfig(r=2, bias=bias))
    expected = trainable(model)
    assert any(name.endswith(".bias") for name in expected)
    model.add_adapter("b", LoraConfig(r=2))
    assert trainable(model) == expected
    with warned("bias="), model.disable_adapter():
        pass
    assert trainable(model) == expected
    model.set_adapter("b")
    model.set_adapter("default")
    assert trainable(model) == expected
    model.delete_adapter("b")
    assert trainable(model) == expected


def test_lora_conversion() -> None:
    model = get_peft_model(kinds(), LoraConfig(target_modules=["lin"]))
    assert model.supports_lora_conversion()
    layer = model.base_model.model.lin
    assert isinstance(layer, BaseTunerLayer) and layer.supports_lora_conversion("default")
