# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Names do not depend on what torch.compile, FSDP or activation checkpointing has put around a model, or into it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import (
    Stack,
    assert_close,
    assert_equal,
    features,
    llama,
    logits,
    randomise,
    refused,
    snapshot,
    stack,
    token_ids,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    weight_tying_report,
)
from peft.hotswap import hotswap_adapter
from peft.utils.wrapped_names import plain_name, with_plain_names


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS, X = token_ids(), features()


class Sharded(nn.Module):
    """What FSDP does to names: one more child, for which the wrapper answers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["_fsdp_wrapped_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


@pytest.fixture(autouse=True)
def names_only() -> Iterator[None]:
    """Wrap modules as compilation does, and compile nothing, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def blocks(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    """Wrap each block of a model, as FSDP and regional compilation do."""
    layers = model.layers if isinstance(model, Stack) else model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer)
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled blocks": lambda model: blocks(compiled, model),
    "sharded": lambda model: Sharded(blocks(Sharded, model)),
    "checkpointed blocks": lambda model: blocks(checkpoint_wrapper, model),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
few_wrappers = pytest.mark.parametrize(
    "wrap",
    [pytest.param(wrap, id=name, marks=[pytest.mark.wide] * ("blocks" in name)) for name, wrap in WRAPPERS.items()],
)

CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "expression": {"target_modules": r"model\.layers\.\d\.self_attn\.q_proj",
                   "rank_pattern": {r"^model\.layers\.1": 3}},
    "tied targets": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.layers.0.mlp"],
              "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}  # fmt: skip


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    """A tied language model with an adapter that has an effect."""
    model = get_peft_model(base, LoraConfig(r=2, **options)).eval()
    randomise(model, "lora_|modules_to_save|trainable_tokens")
    return model


def is_plain(text: str) -> bool:
    return "_orig_mod" not in text and "_wrapped_module" not in text


def under_names_of(wrapped: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors the keys that files have which were saved without regard to wrappers."""
    return {key.replace("base_model.model.", f"base_model.model.{wrapped}.", 1): t for key, t in tensors.items()}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@few_wrappers
def test_adapters_of_wrapped_models_are_those_of_plain_ones(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], options: dict[str, Any]
) -> None:
    model = adapted(wrap(llama(tied=True)), **options)
    plain = adapted(llama(tied=True), **options)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(get_peft_model_state_dict(plain))
    assert is_plain((tmp_path / "adapter_config.json").read_text())
    assert [row.members for row in weight_tying_report(model).rows] == [
        row.members for row in weight_tying_report(plain).rows
    ]
    assert [status.name for status in get_layer_status(model)] == [status.name for status in get_layer_status(plain)]
    for base in (llama(tied=True), wrap(llama(tied=True))):
        again = PeftModel.from_pretrained(base, tmp_path, strict=True)
        assert_close(logits(again, IDS), logits(model, IDS))
    merged = model.merge_and_unload()
    assert_close(logits(merged, IDS), logits(again, IDS))


@pytest.mark.parametrize("wrapped", ["_orig_mod", "_fsdp_wrapped_module", "_orig_mod._fsdp_wrapped_module"])
def test_files_that_were_written_with_names_of_wrappers(tmp_path: Path, wrapped: str) -> None:
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["layers.0.up", "head"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(under_names_of(wrapped, tensors), tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.update(
        target_modules=[f"{wrapped}.layers.0.up", f"{wrapped}.head", "layers.1.down"],
        rank_pattern={rf"^{wrapped}\.head": 2},
        exclude_modules=rf"{wrapped}\.layers\.1\..*",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = PeftModel.from_pretrained(stack(), tmp_path, strict=True)
    assert_equal(logits(again, X), logits(model, X))
    assert again.peft_config["default"].target_modules == {"layers.0.up", "head", "layers.1.down"}
    assert again.load_adapter(tmp_path, "other").unexpected_keys == []
    fresh = get_peft_model(stack(), LoraConfig(r=2, target_modules=["layers.0.up", "head"])).eval()
    hotswap_adapter(fresh, str(tmp_path), "default", torch_device="cpu")
    assert_equal(logits(fresh, X), logits(model, X))


def test_dictionaries_with_names_of_wrappers() -> None:
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)).eval()
    tensors = under_names_of("_orig_mod", get_peft_model_state_dict(model))
    again = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"])).eval()
    assert set_peft_model_state_dict(again, tensors).unexpected_keys == []
    assert_equal(logits(again, X), logits(model, X))
    injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), stack(), state_dict=tensors)
    assert set(get_peft_model_state_dict(injected)) == {
        key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(model)
    }


def test_both_names_at_once_are_refused() -> None:
    """One of the two tensors would be lost."""
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"])).eval()
    tensors = get_peft_model_state_dict(model)
    both = {**tensors, **under_names_of("_orig_mod", tensors)}
    with refused(model, ValueError, "_orig_mod", "both get the key", "a key of its own"):
        set_peft_model_state_dict(model, both)


@wrappers
def test_what_is_gathered_may_have_either_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = get_peft_model(wrap(stack()), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    expected = get_peft_model_state_dict(model)
    gathered = {plain_name(key): tensor for key, tensor in model.state_dict().items()}
    for state_dict in (gathered, model.state_dict()):
        tensors = get_peft_model_state_dict(model, state_dict=state_dict)
        assert tensors.keys() == expected.keys() and all(map(is_plain, tensors))
    whole = get_peft_model_state_dict(wrap(get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"]))))
    assert whole.keys() == expected.keys()


@wrappers
def test_base_weights_go_by_plain_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = get_peft_model(wrap(stack()), LoraConfig(r=2, target_modules=["up"]))
    tensors = get_base_model_state_dict(model)
    assert tensors.keys() == stack().state_dict().keys()
    set_base_model_state_dict(model, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    assert logits(model, X).count_nonzero() == 0
    set_base_model_state_dict(model, wrap(stack()).state_dict())
    assert_equal(logits(model, X), logits(stack(), X))


def test_auto_class_finds_the_base_of_a_compiled_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = llama()
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(compiled(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    mapping = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "LlamaForCausalLM"
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(logits(again, IDS), logits(model, IDS))


def test_a_refused_injection_leaves_a_wrapped_model_alone() -> None:
    base = compiled(stack())
    before = snapshot(base)
    with refused(None, ValueError, "near: head"):
        get_peft_model(base, LoraConfig(target_modules=["haed"]))
    assert snapshot(base) == before


@pytest.mark.parametrize(
    "name, plain",
    [
        ("a._orig_mod.b", "a.b"),
        ("_fsdp_wrapped_module", ""),
        ("a._orig_mod", "a"),
        (r"^_orig_mod\.a\.\d+\._checkpoint_wrapped_module\.b", r"^a\.\d+\.b"),
        ("my_orig_mod.a", "my_orig_mod.a"),
        ("a_mod", "a_mod"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_collections_keep_their_kind() -> None:
    assert with_plain_names(["_orig_mod.a", "b"]) == ["a", "b"]
    assert with_plain_names({"_orig_mod.a"}) == {"a"}
    assert with_plain_names({"_orig_mod.a": 3}) == {"a": 3}
    unchanged = ["a"]
    assert with_plain_names(unchanged) is unchanged and with_plain_names(3) == 3
