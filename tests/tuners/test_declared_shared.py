# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that all layers of a model share, or groups of them, on a declared method of a few lines."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_close, assert_equal, differs, llama, logits, refused, token_ids, warned
from support.registry import methods_put_back
from torch import nn

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.methods import Frozen, Kept, PeftValueError, Shape, Tensors, Trained, TyingConfig, method


@dataclass
class GroupsConfig(TyingConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    size: int = 2
    width: int = 3
    seed: int = 0
    save_frozen: bool = True
    groups_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "GROUPS"


def declare() -> type:
    """Each `size` layers in a row share a vector; all share a matrix; each has numbers of its own, drawn from j."""

    @method("GROUPS", GroupsConfig, dropout="groups_dropout", in_common=("save_frozen",))
    class Groups:
        trained, kept, shared, repeated = ("v",), ("own", "all"), ("v", "all"), ("all",)
        groups = {"v": "group"}

        def values_of_all(targets: Mapping[str, Shape], c: GroupsConfig) -> dict[str, dict[str, Any]]:
            return {name: {"j": j, "group": j // c.size} for j, name in enumerate(targets)}

        def shared_tensors(targets: Mapping[str, Shape], c: GroupsConfig) -> dict[str, Any]:
            rows = max(shape[0] for shape in targets.values())
            generator = torch.Generator().manual_seed(c.seed)
            spec = Kept if c.save_frozen else Frozen
            return {
                "v": {j // c.size: Trained((c.width,), float(j // c.size)) for j in range(0, len(targets), c.size)},
                "all": spec(lambda: torch.rand(rows, 2, generator=generator), (rows, 2), rounded=True),
            }

        def tensors(shape: Shape, c: GroupsConfig) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(c.seed + c.j)
            spec = Kept if c.save_frozen else Frozen
            return {"own": spec(lambda: torch.rand(2, c.width, shape[1], generator=generator))}

        def delta(t: Tensors, shape: Shape, c: GroupsConfig) -> torch.Tensor:
            return t.all[: shape[0]] @ torch.einsum("rwi,w->ri", t.own, t.v)

    return Groups


@pytest.fixture(autouse=True)
def declared() -> Iterator[type]:
    """Declare the method, and forget it afterwards."""
    with methods_put_back():
        yield declare()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))


def adapted(*targets: int, **fields: Any) -> PeftModel:
    return get_peft_model(net(), GroupsConfig(target_modules=list(map(str, targets)), **fields))


def test_a_group_shares_one_trained_tensor() -> None:
    """Targets are counted in the model's order; what they share is trained once, with the gradients of all."""
    model = adapted(4, 0, 2)
    layers = model.get_base_model()
    assert [layers[i].settings["default"].j for i in (0, 2, 4)] == [0, 1, 2]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.0.groups_v.default.0",
        "base_model.model.0.groups_v.default.1",
    ]
    first, second = layers[0].groups_v["default"].values()
    for layer, vector in ((layers[0], first), (layers[2], first), (layers[4], second)):
        expected = layer.groups_all["default"][: layer.out_features] @ torch.einsum(
            "rwi,w->ri", layer.groups_own["default"], vector
        )
        assert_close(layer.get_delta_weight("default"), expected)
    model(torch.randn(3, 4)).sum().backward()
    assert first.grad.any() and second.grad.any()


def test_keys() -> None:
    """The file has a group once, and what is repeated under each layer as well; the model has it with every layer."""
    model = adapted(0, 2, 4)
    assert sorted(get_peft_model_state_dict(model)) == sorted(
        [
            "base_model.groups_v.0",
            "base_model.groups_v.1",
            "base_model.groups_all",
            *(f"base_model.model.{i}.groups_{name}" for i in (0, 2, 4) for name in ("own", "all")),
        ]
    )
    live = {key for key in model.state_dict() if "groups_v" in key}
    assert live == {
        f"base_model.{where}groups_v.default.{group}"
        for where in ("", "model.0.", "model.2.", "model.4.")
        for group in (0, 1)
    }


@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path: Path, save_frozen: bool, low_cpu_mem_usage: bool) -> None:
    """What the config leaves out of files is made anew, the same for an adapter wherever it is loaded."""
    model = adapted(1, 3, save_frozen=save_frozen, seed=3)
    config = GroupsConfig(target_modules=["0", "1", "3"], save_frozen=save_frozen, width=2)
    model.add_adapter("other", config)
    model.set_adapter("other")
    for parameter in model.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        saved = load_file(folder / "adapter_model.safetensors")
        assert any("own" in key for key in saved) is any("all" in key for key in saved) is save_frozen
        assert any("own" in key for key in model.state_dict()) is save_frozen
        model.set_adapter(name)
        again = PeftModel.from_pretrained(net(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_equal(again(x), model(x))
        assert not any(tensor.is_meta for tensor in again.state_dict().values())
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    model.set_adapter("default")
    assert_equal(again(x), model(x))


def test_values_of_the_file_are_loaded(tmp_path: Path) -> None:
    """A group that a file lacks is reported, and keeps its start."""
    model = adapted(0, 2, 4)
    nn.init.normal_(model.base_model.groups_v["default"]["0"])
    model.base_model.groups_all["default"].mul_(2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != "base_model.groups_v.1"}, file)
    with warned("base_model.groups_v.1"):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True)
    x = torch.randn(3, 4)
    assert_equal(again(x), model(x))


def test_an_adapter_is_counted_by_itself() -> None:
    """Its groups, seeds and sizes are those that it has alone, whatever else is in the model."""
    alone = adapted(0, 1, 3, size=1)
    model = adapted(1, 2, 3, 4)
    model.add_adapter("two", GroupsConfig(target_modules=["0", "1", "3"], size=1))
    assert sorted(model.base_model.groups_v["two"]) == ["0", "1", "2"]
    model.set_adapter("two")
    x = torch.randn(3, 4)
    assert_equal(model(x), alone(x))
    layers = model.get_base_model()
    assert layers[0].groups_v is layers[4].groups_v is model.base_model.groups_v


def test_delete_adapter() -> None:
    """Its groups go with it, those of others stay."""
    model = adapted(0, 1)
    model.add_adapter("two", GroupsConfig(target_modules=["1", "2"]))
    model.set_adapter("two")
    model.delete_adapter("default")
    assert list(model.base_model.groups_v) == list(model.base_model.groups_all) == ["two"]
    assert not [key for key in model.state_dict() if ".default" in key]


def test_merge_copy_and_move() -> None:
    """Layers go on sharing in copies, pickles and other types."""
    model = adapted(0, 1, 2, 3).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    assert differs(model.get_base_model()[3].base_layer(x), model.get_base_model()[3](x))
    for again in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        layers = again.get_base_model()
        assert layers[0].groups_v is layers[3].groups_v is again.base_model.groups_v
        assert len([p for p in again.parameters() if p.requires_grad]) == 2
        assert_equal(again(x), expected)
    values = torch.func.functional_call(model, {n: p.detach() * 0 for n, p in model.named_parameters()}, (x,))
    assert not values.any()
    assert_equal(model(x), expected)
    model.merge_adapter()
    assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_close(model(x), expected)


def test_pickle() -> None:
    """A group is one object afterwards, too."""
    layers = adapted(0, 1).get_base_model()
    container = pickle.loads(pickle.dumps([layers[0].groups_v, layers[1].groups_v]))
    assert container[0] is container[1] and list(container[0]["default"]) == ["0"]


def test_tied_layers_count_once() -> None:
    """A layer that follows another one is no target of its own, so it has no number and opens no group."""
    base = llama(tied=True)
    config = GroupsConfig(target_modules=["q_proj", "lm_head"], size=1, ensure_weight_tying=True)
    model = get_peft_model(base, config).eval()
    count = len([name for name, _ in base.named_modules() if name.endswith("q_proj")]) + 1
    assert len(model.base_model.groups_v["default"]) == count
    expected = logits(model, token_ids())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)


def test_drawn_in_order_and_rounded() -> None:
    """Half precision of the base rounds what says so, and nothing else."""
    config = GroupsConfig(target_modules=["0"])
    half = get_peft_model(net().bfloat16(), config).get_base_model()[0]
    full = get_peft_model(net(), config).get_base_model()[0]
    assert half.groups_all["default"].dtype == half.groups_own["default"].dtype == torch.float32
    assert_equal(half.groups_all["default"], full.groups_all["default"].bfloat16().float())
    assert_equal(half.groups_own["default"], full.groups_own["default"])


def test_dropout_is_a_module() -> None:
    """Trainers that switch dropout off look for modules."""
    model = adapted(0, groups_dropout=0.5).train()
    drop = model.get_base_model()[0].groups_dropout["default"]
    assert isinstance(drop, nn.Dropout) and drop.p == 0.5
    nn.init.ones_(model.base_model.groups_v["default"]["0"])
    x = torch.ones(3, 4)
    assert differs(model(x), model(x))
    drop.p = 0.0
    assert_equal(model(x), model(x))
    model.delete_adapter("default")
    assert not model.get_base_model()[0].groups_dropout


def test_adapters_agree_in_what_they_share() -> None:
    """A field of all adapters is the same for all."""
    model = adapted(0)
    with refused(model, PeftValueError, "save_frozen", "'two'"):
        model.add_adapter("two", GroupsConfig(target_modules=["0"], save_frozen=False))


def test_absurd_sizes_are_refused_before_they_are_made() -> None:
    """Nothing is allocated, and the model stays as it was."""
    base = net()
    with refused(base, PeftValueError, "rank and other sizes"):
        get_peft_model(base, GroupsConfig(target_modules=["0"], width=10**7))
