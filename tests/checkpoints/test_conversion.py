# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters of experts that were linear layers, on models that hold the weights of all experts in one parameter."""

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_close, differs, llama, randomise, warned
from support.helpers import logits as outputs
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.checkpoints.conversion.config import convert_peft_config_for_transformers
from peft.checkpoints.conversion.operations import FlattenDims, PeftConcatenate, PermuteDims
from peft.checkpoints.conversion.tensors import build_peft_weight_mapping
from peft.cli import main
from peft.utils.error import PeftNotImplementedError, PeftValueError
from peft.utils.warning import PeftWarning


EXPERTS = 3
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
# model -> config, how an expert is named in old checkpoints, its layers (gate, up, down)
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
OLD_FIELDS = {"r": 2, "lora_alpha": 6, "inference_mode": True, "task_type": "CAUSAL_LM"}
INPUTS = torch.arange(1, 13).reshape(2, 6)


def base(kind: str) -> nn.Module:
    """A model with fused experts, which route every token to two of three."""
    model_cls, config_cls, *_ = MODELS[kind]
    model = model_cls(config_cls(**SIZES)).eval()
    randomise(model, "weight|proj")
    return model


def logits(model: nn.Module) -> torch.Tensor:
    return outputs(model, input_ids=INPUTS)


class OldAdapter:
    """An adapter as an earlier version of transformers has it: factors for each linear layer of each expert."""

    def __init__(self, kind: str, config: LoraConfig, settings: Callable[[str], tuple[int, float]]) -> None:
        self.kind, self.config, self.settings = kind, config, settings
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.experts, self.layers = MODELS[kind][2:]
        state = base(kind).state_dict()
        prefix = "model.layers.{}."
        for i in range(SIZES["num_hidden_layers"]):
            for name in sorted(config.target_modules):
                if name in self.layers:
                    for expert in range(EXPERTS):
                        out, inner = state[f"model.layers.{i}.mlp.experts.down_proj"].shape[1:]
                        rows, columns = (out, inner) if name == self.layers[2] else (inner, out)
                        self._add(f"{prefix.format(i)}{self.experts}.{expert}.{name}", rows, columns)
                for key, value in state.items():  # what is a linear layer still
                    if key.startswith(prefix.format(i)) and key.endswith(f".{name}.weight") and value.dim() == 2:
                        key = key.replace("mlp.", "block_sparse_moe.") if kind == "mixtral" else key
                        self._add(key.removesuffix(".weight"), *value.shape)

    def _add(self, layer: str, rows: int, columns: int) -> None:
        r, _ = self.settings(layer)
        generator = torch.Generator().manual_seed(len(self.factors))
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((r, columns), (rows, r)))
        self.factors[layer] = (a, b)

    def save(self, folder: Path) -> Path:
        tensors = {}
        for layer, factors in self.factors.items():
            for name, factor in zip("AB", factors, strict=True):
                tensors[f"base_model.model.{layer}.lora_{name}.weight"] = factor
        self.config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    def delta(self, layer: str) -> torch.Tensor:
        a, b = self.factors[layer]
        return self.settings(layer)[1] * b @ a

    def applied(self) -> nn.Module:
        """The base model with each expert's own delta added to its own rows of the parameters, by hand."""
        model = base(self.kind)
        state = model.state_dict()
        for layer in self.factors:
            before, _, rest = layer.partition(f".{self.experts}.")
            if rest:
                expert, name = rest.split(".")
                key = "down_proj" if name == self.layers[2] else "gate_up_proj"
                weight = state[f"{before}.mlp.experts.{key}"][int(expert)]
                width = len(weight) // 2
                rows = {self.layers[0]: slice(0, width), self.layers[1]: slice(width, None)}.get(name, slice(None))
                weight[rows] += self.delta(layer)
            else:
                state[f"{layer.replace('block_sparse_moe', 'mlp')}.weight"] += self.delta(layer)
        return model


def plain(r: int = 2, alpha: float = 6) -> Callable[[str], tuple[int, float]]:
    return lambda layer: (r, alpha / r)


def old_adapter(kind: str, names: list[str], settings: Any = None, **fields: Any) -> OldAdapter:
    config = LoraConfig(**{**OLD_FIELDS, "target_modules": names, **fields})
    return OldAdapter(kind, config, settings or plain())


ADAPTERS: dict[str, Callable[[], OldAdapter]] = {
    "mixtral": lambda: old_adapter("mixtral", ["w1", "w2", "w3"]),
    "mixtral, attention and router too": lambda: old_adapter("mixtral", ["w1", "w2", "w3", "q_proj", "gate"]),
    "mixtral, w2": lambda: old_adapter("mixtral", ["w2"]),
    "mixtral, w1 and w3": lambda: old_adapter("mixtral", ["w1", "w3", "v_proj"]),
    "mixtral, dropout": lambda: old_adapter("mixtral", ["w1", "w2", "w3", "q_proj"], lora_dropout=0.05),
    "mixtral, rslora": lambda: old_adapter("mixtral", ["w1", "w2", "w3"], plain(2, 6 * math.sqrt(2)), use_rslora=True),
    "mixtral, patterns": lambda: old_adapter(
        "mixtral",
        ["w1", "w2", "w3", "q_proj"],
        lambda layer: {"w1": (3, 2.0), "w3": (3, 2.0), "w2": (4, 5.0)}.get(layer[-2:], (2, 3.0)),
        rank_pattern={"w1": 3, "w3": 3, "w2": 4},
        alpha_pattern={"w2": 20},
    ),
    "mixtral, one rank more": lambda: old_adapter(
        "mixtral",
        ["w1", "w3"],
        lambda layer: (4, 3.0) if layer.endswith("w1") else (2, 3.0),
        rank_pattern={"w1": 4},
        alpha_pattern={"w1": 12},
    ),
    "mixtral, patterns by layer": lambda: old_adapter(
        "mixtral",
        ["w1", "w3", "w2"],
        lambda layer: (5, 6 / 5) if ".layers.1." in layer else (2, 3.0),
        rank_pattern={r"model\.layers\.1\..*": 5},
    ),
    "mixtral, full names": lambda: old_adapter("mixtral", ["w1", "w3", "w2"]),
    # its shared expert has layers of the same names
    "qwen2_moe": lambda: old_adapter("qwen2_moe", ["gate_proj", "up_proj", "down_proj", "q_proj"]),
    "qwen3_moe": lambda: old_adapter("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
    "qwen3_moe, router too": lambda: old_adapter("qwen3_moe", ["gate", "up_proj", "gate_proj"]),
    "olmoe": lambda: old_adapter("olmoe", ["gate_proj", "up_proj", "down_proj", "o_proj"]),
}


@pytest.fixture
def adapter(name: str, tmp_path: Path) -> OldAdapter:
    adapter = ADAPTERS[name]()
    if name.endswith("full names"):
        adapter.config.target_modules = set(adapter.factors)
    adapter.save(tmp_path)
    return adapter


@pytest.mark.filterwarnings(f"error::{PeftWarning.__module__}.{PeftWarning.__qualname__}")
@pytest.mark.parametrize("name", ADAPTERS)
def test_old_adapter_in_peft_model(name: str, adapter: OldAdapter, tmp_path: Path) -> None:
    """It computes what adding each layer's delta to the weight by hand gives, merged and not."""
    expected = logits(adapter.applied())
    assert differs(expected, logits(base(adapter.kind)))
    model = PeftModel.from_pretrained(base(adapter.kind), tmp_path)
    assert_close(logits(model), expected)
    assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_old_adapter_in_transformers(name: str, adapter: OldAdapter, tmp_path: Path) -> None:
    """The same through `load_adapter` of transformers."""
    model = base(adapter.kind)
    info = model.load_adapter(tmp_path)
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    assert_close(logits(model), logits(adapter.applied()))


@pytest.mark.parametrize("name", ["mixtral, attention and router too", "qwen2_moe"])
def test_saved_again(name: str, adapter: OldAdapter, tmp_path: Path) -> None:
    """What was loaded from old files is saved for parameters, and read back through both ways."""
    model = PeftModel.from_pretrained(base(adapter.kind), tmp_path)
    model.save_pretrained(tmp_path / "new")
    assert not any(re.search(r"experts\.\d", key) for key in load_file(tmp_path / "new/adapter_model.safetensors"))
    expected = logits(model)
    assert_close(logits(PeftModel.from_pretrained(base(adapter.kind), tmp_path / "new")), expected)
    other = base(adapter.kind)
    other.load_adapter(tmp_path / "new")
    assert_close(logits(other), expected)


def test_one_adapter_beside_another(tmp_path: Path) -> None:
    first, second = (old_adapter("mixtral", names) for names in (["w1", "w2", "w3"], ["w1", "w2", "w3", "q_proj"]))
    for adapter, folder in ((first, "first"), (second, "second")):
        (tmp_path / folder).mkdir()
        adapter.save(tmp_path / folder)
    model = PeftModel.from_pretrained(base("mixtral"), tmp_path / "first")
    result = model.load_adapter(tmp_path / "second", "second")
    assert not result.unexpected_keys
    assert_close(logits(model), logits(first.applied()))
    model.set_adapter("second")
    assert_close(logits(model), logits(second.applied()))


@pytest.mark.parametrize("name", ["mixtral, attention and router too", "qwen2_moe"])
def test_old_adapter_is_verified(name: str, adapter: OldAdapter, tmp_path: Path) -> None:
    """The command line finds nothing wrong with it."""
    base(adapter.kind).config.save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--base", str(tmp_path)]) == 0


# ------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(
    ("targets", "modules", "parameters"),
    [
        (["w1", "w2", "w3"], set(), {"gate_up_proj", "down_proj"}),
        (["w1", "w3", "q_proj", "gate"], {"q_proj"}, {"gate_up_proj", "gate.weight"}),
        ([f"experts.{i}.w2" for i in range(EXPERTS)], set(), {"down_proj"}),
        (r".*\.block_sparse_moe\.experts\.\d+\.w[123]", set(), {"gate_up_proj", "down_proj"}),
        (r".*\.(w2|q_proj)", {"q_proj"}, {"down_proj"}),
        (r".*\.0\..*\.(w2|q_proj)", {"0.self_attn.q_proj"}, {"model.layers.0.mlp.experts.down_proj"}),
        ([f"layers.1.mlp.experts.{i}.w2" for i in range(EXPERTS)], set(), {"model.layers.1.mlp.experts.down_proj"}),
        ("all-linear", "all-linear", {"gate_up_proj", "down_proj", "gate.weight"}),
        (["q_proj", "typo"], {"q_proj", "typo"}, None),
    ],
)
def test_targets(targets: Any, modules: Any, parameters: set[str] | None) -> None:
    config = LoraConfig(r=2, target_modules=targets)
    model = base("mixtral")
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config.target_modules == modules
    assert config.target_parameters == parameters
    before = copy.deepcopy(config)
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config == before


def test_rank_of_what_was_several_layers() -> None:
    """A fresh adapter has as many directions for a parameter as its layers had together, scaled as they were."""
    model = get_peft_model(base("mixtral"), LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3"]))
    layers = {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name") and "default" in m.r}
    assert {name: (m.r["default"], m.scaling["default"]) for name, m in layers.items()} == {
        "gate_up_proj": (4, 3.0),
        "down_proj": (2, 3.0),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["w1", "w2"]}, "holds those of w1, w3 of all experts"),
        ({"target_modules": ["experts.0.w2"]}, "down_proj' holds those of w2 of all experts"),
        ({"target_modules": ["w1", "w3"], "exclude_modules": ["experts.1.w3"]}, "reaches a part only"),
        ({"target_modules": ["w2"], "rank_pattern": {r"experts\.0\.w2": 4}}, "tells experts apart"),
        ({"target_modules": ["w1", "w3"], "rank_pattern": {"w1": 4}}, "different scalings"),
        ({"target_modules": ["w1", "w2", "w3"], "lora_dropout": 0.1}, "lora_dropout does not work"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    model = base("mixtral")
    before = set(model.state_dict())
    with pytest.raises(PeftValueError, match=message):
        get_peft_model(model, LoraConfig(r=2, **fields))
    assert set(model.state_dict()) == before


def test_names_of_modules_stay_with_the_modules(tmp_path: Path) -> None:
    """A new adapter for the shared expert of Qwen-MoE does not become one for all experts; a warning tells how to."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    with warned("add target_parameters=['down_proj', 'gate_up_proj']"):
        model = get_peft_model(base("qwen2_moe"), LoraConfig(target_modules=targets))
    assert {key.split(".mlp.")[1].split(".")[0] for key in model.state_dict() if "lora_A" in key} == {"shared_expert"}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        PeftModel.from_pretrained(base("qwen2_moe"), tmp_path)
        get_peft_model(base("qwen2_moe"), LoraConfig(target_modules=targets, target_parameters=["gate_up_proj"]))


def test_other_methods_are_left_alone() -> None:
    config = IA3Config(target_modules=["w1"], feedforward_modules=[])
    model = base("mixtral")
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config.target_modules == {"w1"}


def test_a_function_in_its_place_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients replace the conversion of configs, at its public path, to keep modules as targets."""
    seen = []
    path = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"
    monkeypatch.setattr(path, lambda config, model, conversions: seen.append(config.target_modules))
    config = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    get_peft_model(base("mixtral"), config)
    assert seen == [{"q_proj", "w1", "w2", "w3"}]


# ------------------------------------------------------------------------------------------ load_adapter
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=["lora", "embedding", "dora", "bias", "modules_to_save", "tokens", "ia3", "loha"],
)
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_adapters_of_models_without_experts(config: Any, adapter_name: str, tmp_path: Path) -> None:
    """transformers' `load_adapter` reads what was saved here."""
    first, other = llama(), llama()
    for model in (first, other):
        randomise(model, "weight")
    model = get_peft_model(first, config).eval()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.data += torch.rand_like(parameter)
    model.save_pretrained(tmp_path)
    assert differs(logits(other), logits(model))
    info = other.load_adapter(tmp_path, adapter_name=adapter_name)
    assert not info.missing_keys and not info.unexpected_keys
    assert_close(logits(other), logits(model))


# ------------------------------------------------------------------------------------------ operations
def test_permute_and_its_reverse() -> None:
    x = torch.randn(2, 3, 4)
    operation = PermuteDims((2, 0, 1))
    permuted = operation.convert({"a": x}, ["a"], ["b"], None)["a"]
    assert permuted.shape == (4, 2, 3)
    assert torch.equal(operation.reverse_op.convert({"a": permuted}, ["a"], ["b"], None)["a"], x)


def test_flatten() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(FlattenDims((0, 1)).convert({"a": x}, ["a"], ["b"], None)["a"], x.reshape(6, 4))


def test_concatenated_factors() -> None:
    """The product of what is fused is the stack of the products, for each expert."""
    a = [torch.randn(EXPERTS, r, 5) for r in (2, 3)]
    b = [torch.randn(EXPERTS, out, r) for out, r in ((4, 2), (6, 3))]
    sources = ["w1", "w3"]
    fused = PeftConcatenate(dim=1).convert(dict(zip(sources, b, strict=True)), sources, ["t"], full_layer_name="t")[
        "t"
    ]
    left = fused.unflatten(1, (-1, EXPERTS)).permute(2, 0, 1)
    assert_close(left @ torch.cat(a, dim=1), torch.cat([y @ x for x, y in zip(a, b, strict=True)], 1))


@pytest.mark.parametrize("operation", [FlattenDims((0, 1)), PeftConcatenate(dim=1)])
def test_no_way_back(operation: Any) -> None:
    with pytest.raises(PeftNotImplementedError):
        operation.reverse_op  # noqa: B018


def test_mapping_without_a_config() -> None:
    """Every method's tensors get the adapter's name, and all experts are looked for."""
    conversions = get_model_conversion_mapping(base("mixtral"))
    mapping = build_peft_weight_mapping(conversions, "mine")
    targets = set(itertools.chain(*(conversion.target_patterns for conversion in mapping)))
    assert {".experts.base_layer.lora_A.mine.weight", ".experts.lora_B.mine.weight"} <= targets
    for key, expected in {
        "base_model.model.model.q_proj.lora_A.weight": "model.q_proj.lora_A.mine.weight",
        "base_model.model.model.q_proj.hada_w1_a": "model.q_proj.hada_w1_a.mine",
        "base_model.model.model.block_sparse_moe.gate.ia3_l": "model.mlp.gate.ia3_l.mine",
    }.items():
        for conversion in mapping:
            key = conversion.rename_source_key(key)[0]
        assert key == expected
