# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Lily against its formula, and which layers share which tensors."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.helpers import refused
from torch import nn

from peft import (
    LilyConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)


class Block(nn.Module):
    """Two layers of one shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.xq, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., 8) to (..., 8)."""
        return torch.tanh(self.up(torch.tanh(self.q(x) + self.xq(x))))[..., :8]


def blocks(count: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def config(**fields: Any) -> LilyConfig:
    return LilyConfig(**{"r": 2, "target_modules": ["q", "up"], "init_weights": False, **fields})


def adapted(count: int = 4, **fields: Any) -> PeftModel:
    base = blocks(count)
    torch.manual_seed(1)
    return get_peft_model(base, config(**fields)).eval()


def sharing(model: nn.Module, container: str, layer: str, adapter: str = "default") -> list[int]:
    """Give for each block the first block that has the same module."""
    net = model.get_base_model() if isinstance(model, PeftModel) else model
    held = [id(getattr(block.get_submodule(layer), container)[adapter]) for block in net]
    return [held.index(module) for module in held]


# ------------------------------------------------------------------------------------------ formula
@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 8), (8,)])
def test_formula(shape: tuple[int, ...], experts: int) -> None:
    net = nn.Sequential(nn.Linear(8, 6))
    get_peft_model(net, config(num_B=experts, scaling=0.5, target_modules=["0"]))
    layer, x = net[0], torch.randn(shape)
    a, b, router = (getattr(layer, f"lily_{name}")["default"].weight for name in ("A", "B", "router"))
    rows = x.reshape(-1, 8)
    shares = [F.softmax(router @ (a @ row), dim=0) for row in rows]
    mean = sum(shares) / len(rows)
    mixed = sum(mean[k] * b[2 * k : 2 * k + 2] for k in range(experts))
    expected = layer.base_layer(x) + 0.5 * torch.stack([(a @ row) @ mixed for row in rows]).view(*shape[:-1], 6)
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("init_weights", [True, False])
def test_start(init_weights: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 6))
    torch.manual_seed(5)
    get_peft_model(net, config(target_modules=["0"], init_weights=init_weights))
    torch.manual_seed(5)
    a, b, router = (nn.Linear(*size, bias=False) for size in ((8, 2), (6, 4), (2, 2)))
    a.reset_parameters()
    router.reset_parameters()
    b.reset_parameters() if not init_weights else nn.init.zeros_(b.weight)
    for name, made in {"A": a, "B": b, "router": router}.items():
        assert torch.equal(getattr(net[0], f"lily_{name}")["default"].weight, made.weight), name


def test_layers_that_share_draw_as_well() -> None:
    model = adapted(2)
    torch.manual_seed(1)
    for _, outputs in (("0.q", 8), ("0.up", 12), ("1.q", 8), ("1.up", 12)):
        for size in ((8, 2), (outputs, 4), (2, 2), (8, 2)):
            nn.Linear(*size, bias=False)
        last = nn.Linear(2, 2, bias=False)
        nn.Linear(outputs, 4, bias=False)
    assert torch.equal(model.get_base_model()[1].up.lily_router["default"].weight, last.weight)


# ------------------------------------------------------------------------------------------ sharing
@pytest.mark.parametrize(
    ("stride", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (3, [0, 0, 0, 3]), (9, [0, 0, 0, 0])]
)
def test_neighbours_share_a_and_all_share_b(stride: int, expected: list[int]) -> None:
    model = adapted(stride_A=stride)
    model.add_adapter("other", config(stride_A=stride))
    for adapter in ("default", "other"):
        for layer in ("q", "up"):
            assert sharing(model, "lily_A", layer, adapter) == expected
            assert sharing(model, "lily_B", layer, adapter) == [0, 0, 0, 0]
            assert sharing(model, "lily_router", layer, adapter) == [0, 1, 2, 3]
    first = model.get_base_model()[0]
    assert first.q.lily_B["default"] is not first.up.lily_B["default"]
    assert first.q.lily_B["default"] is not first.q.lily_B["other"]


def test_groups_follow_entries_and_shapes() -> None:
    def groups(**fields: Any) -> dict[str, int]:
        net = adapted(2, **fields).get_base_model()
        layers = {name: m for name, m in net.named_modules() if hasattr(m, "lily_B")}
        first: dict[int, int] = {}
        return {name: first.setdefault(id(m.lily_B["default"]), len(first)) for name, m in layers.items()}

    assert groups(target_modules=r"\d\.(q|xq|up)") == {"0.q": 0, "0.xq": 0, "0.up": 1, "1.q": 0, "1.xq": 0, "1.up": 1}
    assert groups(target_modules=["q", "xq"]) == {"0.q": 0, "0.xq": 1, "1.q": 0, "1.xq": 1}
    for entries in (["q", "1.q"], ["1.q", "q"]):  # the longest that matches
        assert groups(target_modules=entries) == {"0.q": 0, "1.q": 1}


def test_gradients_are_summed_over_layers_that_share() -> None:
    model, x = adapted(3, target_modules=["q"]), torch.randn(4, 8)
    alone = copy.deepcopy(model)
    for block in alone.get_base_model():
        block.q.lily_B["default"] = copy.deepcopy(block.q.lily_B["default"])
    for either in (model, alone):
        either(x).square().sum().backward()
    shared = model.get_base_model()[0].q.lily_B["default"].weight.grad
    torch.testing.assert_close(shared, sum(b.q.lily_B["default"].weight.grad for b in alone.get_base_model()))
    assert sum(p.requires_grad for p in model.parameters()) == 3 + 1 + 3


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_sharing_survives(deduplicate: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, x = adapted(stride_A=2), torch.randn(4, 8)
    expected = model(x)
    model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("lily_B" in key for key in keys) == (2 if deduplicate else 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        again = PeftModel.from_pretrained(blocks(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        again.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    bare = inject_adapter_in_model(config(stride_A=2), blocks(), low_cpu_mem_usage=low_cpu_mem_usage)
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(bare, tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    cast = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    for one in (again, bare, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cast):
        assert sharing(one, "lily_A", "up") == [0, 0, 2, 2] and sharing(one, "lily_B", "q") == [0, 0, 0, 0]
        if one is not cast:
            assert torch.equal(one.eval()(x), expected)
    again.set_adapter("other")
    assert sharing(again, "lily_A", "up", "other") == [0, 0, 2, 2] and torch.equal(again(x), expected)
    again.delete_adapter("default")
    assert torch.equal(again(x), expected)


def test_copies_that_differ_are_reported(tmp_path: Path) -> None:
    model, x = adapted(2), torch.randn(4, 8)
    expected = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.1.q.lily_B.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(PeftWarning, match=key):
        again = PeftModel.from_pretrained(blocks(2), tmp_path)
    assert torch.equal(again(x), expected)


# ------------------------------------------------------------------------------------------ refusals
def test_merging_and_adapters_per_sample_are_refused() -> None:
    model, x = adapted(2), torch.randn(4, 8)
    layer = model.get_base_model()[0].q
    for merging in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with refused(model, NotImplementedError, "'default'", "keep it unmerged"):
            merging()
    with refused(model, NotImplementedError, "'default'"):
        layer.get_delta_weight("default")
    with refused(model, TypeError, "adapter_names", "a batch of its own"):
        model(x, adapter_names=["default"] * 4)
    assert not model.base_model.supports_lora_conversion()
    with model.disable_adapter():
        assert torch.equal(model(x), blocks(2)(x))
    assert torch.equal(model.unload()(x), blocks(2)(x))


@pytest.mark.parametrize(
    ("fields", "mention"),
    [({"stride_A": 0}, "stride_A"), ({"num_B": 1}, "num_B"), ({"layers_pattern": "h"}, "layers_pattern")],
)
def test_bad_configs_are_refused(fields: dict[str, Any], mention: str) -> None:
    with pytest.raises(ValueError, match=mention):
        config(**fields)


def test_ranks_that_are_none_are_refused() -> None:
    base = blocks(1)
    with refused(base, ValueError, "r must be", "-1"):
        get_peft_model(base, config(r=-1))
