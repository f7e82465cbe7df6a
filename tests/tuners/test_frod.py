# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FRoD against F = U (diag(l) + S) V' put together entry by entry, and bases that roles share."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, linears, refused, trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import FrodConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.frod.maths import block_of, common_basis, number_of_pairs, random_pairs, role_of
from peft.utils.error import PeftValueError


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:save_projection=False:peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:peft.utils.warning.PeftWarning"),
]


class Blocks(nn.Module):
    """Two blocks with layers of two roles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 6)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block["q"](x) + block["v"](x)[..., :4]
        return x


def adapted(base: nn.Module, *targets: str, **fields: object) -> PeftModel:
    config = {"sparse_rate": 0.3, "init_weights": False, "progressbar": False, "target_modules": list(targets)}
    return get_peft_model(base, FrodConfig(**{**config, **fields})).eval()


@pytest.mark.parametrize("base", [nn.Linear(5, 8), nn.Linear(8, 5), Conv1D(5, 8)])
def test_entry_by_entry(base: nn.Module) -> None:
    net = nn.Sequential(base)
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()
    model = adapted(net, "0")
    layer = net[0]
    u, scales, v = layer.frod_U["default"], layer.frod_lambda_l["default"].detach(), layer.frod_V["default"]
    assert_close(u @ torch.diag(layer.frod_lambda_0["default"]) @ v.T, weight)
    assert_close(u.norm(dim=0)[u.norm(dim=0) > 0.5], torch.ones(int((u.norm(dim=0) > 0.5).sum())))
    full = torch.diag(scales)
    pairs = layer.frod_s_indices["default"].T.tolist()
    for (row, column), value in zip(pairs, layer.frod_lambda_s_values["default"], strict=True):
        assert row != column
        full[row, column] += value.item()
    expected = u @ full @ v.T
    x = torch.randn(2, 3, layer.in_features)
    assert_close(model(x), x @ expected.T + base.bias)
    layer.merge()
    assert_close(model(x), x @ expected.T + base.bias)
    layer.unmerge()
    assert_equal(base.weight.T if isinstance(base, Conv1D) else base.weight, weight)


def test_fresh_adapter() -> None:
    base = Blocks()
    x = torch.randn(3, 4)
    expected = base(x)
    model = adapted(base, "q", "v", init_weights=True)
    assert_equal(model(x), expected)
    assert trainable(model) == {
        f"base_model.model.layers.{i}.{role}.frod_{name}.default"
        for i in range(2)
        for role in "qv"
        for name in ("lambda_l", "lambda_s_values")
    }


def test_keys() -> None:
    """The bases stand beside the layers, role by role, in checkpoints and in the model."""
    model = adapted(Blocks(), "q", "v")
    shared = {f"base_model.frod_{name}.{role}" for name in ("V", "s_indices", "s_size") for role in "qv"}
    assert {key for key in get_peft_model_state_dict(model) if "lambda" not in key} == shared
    assert {key for key in model.state_dict() if "frod" in key and "lambda" not in key} == {
        f"{key}.default" for key in shared
    }
    assert model.base_model.frod_s_size["q"]["default"].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("name", "role", "block"),
    [
        ("lin", "lin", 7),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.block.2.layer.0.SelfAttention.q", "SelfAttention_q", 2),
        ("bert.encoder.layer.1.attention.output.dense", "attention_output", 1),
        ("bert.encoder.layer.1.output.dense", "output_dense", 1),
        ("net.4.lin", "lin", 4),
        ("0", "0", 0),
    ],
)
def test_names(name: str, role: str, block: int) -> None:
    assert (role_of(name), block_of(name, 7)) == (role, block)


@pytest.mark.parametrize("rows", [(2, 2), (3, 6), (6, 6, 6)])
def test_basis(rows: tuple[int, ...]) -> None:
    """With few rows it is that of the SVD; else the inverses of the parts are diagonal in the mean."""
    weights = [torch.randn(count, 5) for count in rows]
    v = common_basis(weights, 0.1)
    assert v.shape == (5, 5) and torch.linalg.matrix_rank(v) == 5
    stacked = torch.cat(weights)
    if sum(rows) < 5:
        assert_close(v.T @ v, torch.eye(5))
        gram = v.T @ stacked.T @ stacked @ v
        assert_close(gram, torch.diag(gram.diagonal()), atol=1e-4)
        return
    inverse = torch.linalg.inv(v)
    assert_close(inverse @ (stacked.T @ stacked) @ inverse.T, torch.eye(5), atol=1e-3)


@pytest.mark.parametrize(("n", "rate", "count"), [(4, 0.3, 4), (4, 1.0, 12), (4, 0.001, 1), (4, 0.0, 0), (1, 0.5, 0)])
def test_pairs(n: int, rate: float, count: int) -> None:
    """They are those off the diagonal, row by row, that a permutation puts first."""
    assert number_of_pairs(n, rate) == count
    every = [(i, j) for i in range(n) for j in range(n) if i != j]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(3))[:count]
    pairs = random_pairs(n, rate, torch.Generator().manual_seed(3))
    assert pairs.shape == (2, count) and [tuple(p) for p in pairs.T.tolist()] == [every[k] for k in order]


def test_the_basis_of_a_file_decides(tmp_path: Path) -> None:
    """Another machine finds another basis, such as one with other signs; what a file says holds for U too."""
    model = adapted(Blocks(), "q", "v")
    for role in "qv":
        model.base_model.frod_V[role]["default"].mul_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    x = torch.randn(3, 4)
    expected = model(x)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(Blocks(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_close(again(x), expected)
        assert_equal(copy.deepcopy(again)(x), again(x))
        assert_equal(pickle.loads(pickle.dumps(again))(x), again(x))
        assert_close(again.double()(x.double()).float(), expected)


@pytest.mark.parametrize("save_projection", [True, False])
def test_second_adapter_is_what_it_is_alone(tmp_path: Path, save_projection: bool) -> None:
    """It has bases and pairs of its own, whatever was adapted before."""
    model = adapted(Blocks(), "layers.0.q", "v", save_projection=save_projection)
    fields = {"sparse_rate": 0.5, "save_projection": save_projection, "progressbar": False}
    config = FrodConfig(target_modules=["q"], init_weights=False, **fields)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    x = torch.randn(3, 4)
    expected = model.eval()(x)
    assert_equal(PeftModel.from_pretrained(Blocks(), tmp_path / "second")(x), expected)
    model.delete_adapter("default")
    assert_equal(model(x), expected)
    assert not [key for key in model.state_dict() if "default" in key]


def test_dropout() -> None:
    net = linears(4, 5)
    model = adapted(net, "0", frod_dropout=0.5).train()
    x = torch.ones(3, 4)
    assert differs(model(x), model(x))
    assert_equal(model.eval()(x), model(x))


def test_restart() -> None:
    net = linears(4, 6)
    adapted(net, "0", init_weights=True)
    nn.init.ones_(net[0].frod_lambda_l["default"])
    net[0].reset_frod_parameters("default")
    assert_equal(net[0].frod_lambda_l["default"], net[0].frod_lambda_0["default"])


def test_widths_of_a_role() -> None:
    net = nn.ModuleDict({"a": nn.ModuleDict({"0": linears(4, 6)}), "b": nn.ModuleDict({"0": linears(3, 6)})})
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    with refused(net, PeftValueError, "share a basis"):
        get_peft_model(net, FrodConfig(target_modules=names, progressbar=False))


def test_needs_a_place_beside_the_layers() -> None:
    net = linears(4, 6)
    with refused(net, PeftValueError, "get_peft_model"):
        inject_adapter_in_model(FrodConfig(target_modules=["0"]), net)


def test_what_has_no_effect_is_said() -> None:
    with pytest.warns(UserWarning, match="runtime_offload_base_weight"):
        adapted(linears(4, 6), "0", runtime_offload_base_weight=True)


@pytest.mark.parametrize("field", ["projection_prng_key", "save_projection"])
def test_adapters_agree(field: str) -> None:
    model = adapted(linears(4, 6), "0")
    with refused(model, PeftValueError, field):
        model.add_adapter("two", FrodConfig(target_modules=["0"], **{field: False if "save" in field else 7}))


@pytest.mark.parametrize("fields", [{"sparse_rate": 1.5}, {"layers_pattern": "layers"}])
def test_refused_by_the_config(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        FrodConfig(**fields)
