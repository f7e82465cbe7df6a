# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on Megatron's parallel layers; processes are threads here."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import refused
from support.megatron import THREADS, Mlp, TransformerConfig, megatron, part_of
from torch import nn
from torch.testing import assert_close

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.tp_layer import LoraParallelLinear, dispatch_megatron, get_default_module_allowlist


__all__ = ["megatron"]
WIDE, NARROW, R = 8, 4, 2
SETTINGS = {"num_layers": 1, "hidden_size": NARROW}


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "target_modules": ["up", "down"], "megatron_config": SETTINGS, **kwargs})


@pytest.fixture
def weights(megatron: Any) -> dict[str, torch.Tensor]:
    """What the whole model has, and its adapter."""
    shapes = {"up": (WIDE, NARROW), "down": (NARROW, WIDE), "up_a": (R, NARROW), "up_b": (WIDE, R),
              "down_a": (R, WIDE), "down_b": (NARROW, R), "x": (5, 3, NARROW)}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def adapted(weights: dict[str, torch.Tensor], **kwargs: Any) -> PeftModel:
    """Adapt the part of the model that the running thread has."""
    model = get_peft_model(Mlp(weights["up"], weights["down"]), lora(**kwargs))
    base = model.get_base_model()
    with torch.no_grad():
        base.up.lora_A["default"].weight.copy_(weights["up_a"])
        base.up.lora_B["default"].weight.copy_(part_of(weights["up_b"], 0))
        base.down.lora_A["default"].weight.copy_(part_of(weights["down_a"], 1))
        base.down.lora_B["default"].weight.copy_(weights["down_b"])
    return model


def expected(weights: dict[str, torch.Tensor], scaling: float = 8 / R) -> torch.Tensor:
    up = weights["up"] + scaling * weights["up_b"] @ weights["up_a"]
    down = weights["down"] + scaling * weights["down_b"] @ weights["down_a"]
    return torch.relu(weights["x"] @ up.T) @ down.T


@pytest.mark.parametrize("size", [1, 2])
def test_parts_compute_what_the_whole_does(weights: dict[str, torch.Tensor], size: int) -> None:
    """Forward, gradients, disabled, merged and unmerged: as if no weight were divided."""
    leaves = {name: weights[name].clone().requires_grad_() for name in ("up_a", "up_b", "down_a", "down_b")}
    wanted = expected({**weights, **leaves})
    wanted.square().sum().backward()

    def work(rank: int) -> None:
        model = adapted(weights)
        layer = model.get_base_model().up
        assert isinstance(layer, LoraParallelLinear) and layer.weight.shape == (WIDE // size, NARROW)
        output = model(weights["x"])
        assert_close(output, wanted)
        output.square().sum().backward()
        for name, axis in {"up_a": None, "up_b": 0, "down_a": 1, "down_b": None}.items():
            side, factor = name.split("_")
            found = getattr(getattr(model.get_base_model(), side), f"lora_{factor.upper()}")["default"].weight.grad
            assert_close(found, leaves[name].grad if axis is None else part_of(leaves[name].grad, axis))
        with torch.no_grad(), model.disable_adapter():
            assert_close(model(weights["x"]), expected(weights, 0))
        with torch.no_grad():
            model.merge_adapter()
            assert_close(model(weights["x"]), wanted)
            model.unmerge_adapter()
            assert_close(model.get_base_model().up.weight, part_of(weights["up"], 0))
            merged = model.merge_and_unload()
            assert not isinstance(merged.up, LoraParallelLinear)
            assert_close(merged(weights["x"]), wanted)

    THREADS.run(size, work)


def test_a_fresh_adapter_changes_nothing_and_parts_start_differently(weights: dict[str, torch.Tensor]) -> None:
    """The factor that is whole is the same in each process, as its random numbers are; the parts are drawn there."""

    def work(rank: int) -> dict[str, torch.Tensor]:
        config = lora()
        model = Mlp(weights["up"], weights["down"])
        layer = dispatch_megatron(
            model.down, "default", config, r=R, lora_alpha=8, init_method=lambda part: part.fill_(rank + 1.0)
        )
        assert_close(layer(part_of(weights["down"], 1))[0], model.down(part_of(weights["down"], 1))[0])
        return layer.lora_A["default"].weight.detach()

    parts = THREADS.run(2, work)
    assert [part.unique().tolist() for part in parts] == [[1.0], [2.0]]
    whole = THREADS.run(1, work)[0]
    assert len(whole.unique()) == whole.numel()  # drawn as the config says


def test_adapters_are_saved_loaded_copied_and_added(weights: dict[str, torch.Tensor], tmp_path: Any) -> None:
    model = adapted(weights, megatron_config={**SETTINGS, "params_dtype": torch.float32})
    wanted = model(weights["x"])
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.{side}.lora_{factor}.weight" for side in ("down", "up") for factor in "AB"
    ]
    settings = json.loads((tmp_path / "adapter_config.json").read_text())["megatron_config"]
    assert settings == {**SETTINGS, "params_dtype": "torch.float32"}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            Mlp(weights["up"], weights["down"]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert_close(loaded(weights["x"]), wanted)
    assert_close(copy.deepcopy(model)(weights["x"]), wanted)
    assert_close(pickle.loads(pickle.dumps(model))(weights["x"]), wanted)
    model.add_adapter("other", lora(r=1))
    model.set_adapter("other")
    assert model.get_base_model().down.lora_A["other"].weight.shape == (1, WIDE)
    assert_close(model(weights["x"]), expected(weights, 0))
    model.delete_adapter("other")
    assert_close(model(weights["x"]), wanted)


def test_sequences_that_are_divided_are_noted_on_the_whole_factor(weights: dict[str, torch.Tensor]) -> None:
    model = get_peft_model(
        Mlp(weights["up"], weights["down"]), lora(megatron_config={**SETTINGS, "sequence_parallel": True})
    )
    base = model.get_base_model()
    assert base.up.lora_A["default"].weight.sequence_parallel and base.down.lora_B["default"].weight.sequence_parallel


def test_other_layers_are_adapted_as_ever(weights: dict[str, torch.Tensor]) -> None:
    net = nn.Sequential(Mlp(weights["up"], weights["down"]), nn.Linear(NARROW, 3))
    model = get_peft_model(net, lora(target_modules=["0.up", "1"]))
    assert type(model.get_base_model()[1]).__name__ == "Linear" and model(weights["x"]).shape[-1] == 3
    assert dispatch_megatron(net[1], "default", lora(), r=R, lora_alpha=8) is None
    assert dispatch_megatron(Mlp(weights["up"], weights["down"]).up, "default", LoraConfig(), r=R) is None


@pytest.mark.parametrize(
    ("kwargs", "classes", "mentions"),
    [
        ({"megatron_core": "os.path"}, ValueError, ("'os.path'", "may not be imported", "megatron.core")),
        ({"megatron_core": "megatron"}, ValueError, ("'megatron'", "may not be imported")),
        ({"megatron_core": "megatron_of_somebody.core"}, ValueError, ("may not be imported",)),
        ({"megatron_core": "megatron.nothing"}, ImportError, ("megatron.nothing", "pip install megatron-core")),
        ({"megatron_config": {"hidden": 4}}, ValueError, ("'hidden'", "TransformerConfig")),
        ({"megatron_config": {**SETTINGS, "num_attention_heads": 3}}, ValueError, ("multiple", "TransformerConfig")),
        ({"lora_bias": True}, NotImplementedError, ("lora_bias", "ColumnParallelLinear")),
        ({"init_lora_weights": "pissa"}, ValueError, ("pissa", "divided", "True")),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, NotImplementedError, ("alora",)),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(
    weights: dict[str, torch.Tensor], kwargs: dict[str, Any], classes: type, mentions: tuple[str, ...]
) -> None:
    base = Mlp(weights["up"], weights["down"])
    with refused(base, classes, *mentions):
        get_peft_model(base, lora(**kwargs))


def test_layers_without_a_weight_of_their_own_are_refused(weights: dict[str, torch.Tensor]) -> None:
    base = Mlp(weights["up"], weights["down"])
    base.up.weight = None
    with refused(base, ValueError, "ColumnParallelLinear", "no weight of its own", "target_modules"):
        get_peft_model(base, lora())


def test_without_megatron_config_the_layers_are_refused(weights: dict[str, torch.Tensor]) -> None:
    base = Mlp(weights["up"], weights["down"])
    with refused(base, ValueError, "ColumnParallelLinear"):
        get_peft_model(base, lora(megatron_config=None))


def test_adalora_has_no_parallel_layers(weights: dict[str, torch.Tensor]) -> None:
    base = Mlp(weights["up"], weights["down"])
    with refused(base, NotImplementedError, "AdaLoraModel", "megatron_config"):
        get_peft_model(base, AdaLoraConfig(target_modules=["up"], megatron_config=SETTINGS, total_step=10))


def test_without_megatron_the_config_is_refused() -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    with refused(base, ImportError, "megatron.core", "pip install megatron-core"):
        get_peft_model(base, LoraConfig(target_modules=["0"], megatron_config=SETTINGS))


def test_samples_cannot_have_adapters_of_their_own(weights: dict[str, torch.Tensor]) -> None:
    model = adapted(weights).eval()
    with pytest.raises(TypeError, match="LoraParallelLinear"):
        model(weights["x"], adapter_names=["default"] * 5)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model.get_base_model().up(weights["x"], adapter_names=["default"] * 5)


def test_the_layer_is_made_as_clients_do(weights: dict[str, torch.Tensor], megatron: Any) -> None:
    """Positional arguments; a backend is whatever has both classes."""
    backend = SimpleNamespace(
        ColumnParallelLinear=megatron.ColumnParallelLinear, RowParallelLinear=megatron.RowParallelLinear
    )
    own = TransformerConfig(1, NARROW, sequence_parallel=True)
    base = Mlp(weights["up"], weights["down"]).up
    layer = LoraParallelLinear(base, "a", lora(), backend, R, 4, megatron_config=own)
    assert layer.lora_B["a"].config is own and layer.scaling["a"] == 2
    layer.update_layer("b", 1, 2, LoraConfig())
    assert layer.lora_B["b"].config is base.config
    assert list(inspect.signature(LoraParallelLinear.update_layer).parameters)[:5] == [
        "self", "adapter_name", "r", "lora_alpha", "config"
    ]  # fmt: skip
    assert get_default_module_allowlist() == ["megatron"]
