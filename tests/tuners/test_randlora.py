# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RandLoRA against its sum over bases, entry by entry, and bases that come from a seed."""

import math
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, linears, refused, trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, RandLoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.randlora.maths import UniqueBaseGrad, random_basis, sparse_basis
from peft.utils.error import PeftValueError


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:save_projection=False:peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:peft.utils.warning.PeftWarning"),
]


def adapted(base: nn.Module, *targets: str, **fields: object) -> PeftModel:
    config = {"r": 3, "randlora_alpha": 2, "init_weights": False, "target_modules": list(targets), **fields}
    model = get_peft_model(base, RandLoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("base", [nn.Linear(5, 8), nn.Linear(8, 5), Conv1D(5, 8), nn.Linear(7, 7)])
def test_sum_over_bases(base: nn.Module) -> None:
    """Rows k n + b of one factor meet columns b r + k of the other; smaller layers use corners."""
    net = nn.Sequential(base, nn.Linear(base.weight.shape[0 if isinstance(base, nn.Linear) else 1], 11))
    adapted(net, "0", "1")
    layer = net[0]
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]
    scales, gains = layer.randlora_lambda["default"].detach(), layer.randlora_gamma["default"].detach()
    out, inputs = layer.out_features, layer.in_features
    smaller, larger, r = min(out, inputs), max(out, inputs), 3
    n = math.ceil(smaller / r)
    assert (a.shape, b.shape) == ((3, 1, 8 if out == 8 else 7 if out == 7 else 8), (11, b.shape[1], 3))
    assert (scales.shape, gains.shape) == ((r, n), (n, smaller))
    delta = torch.zeros(larger, smaller)
    for j in range(n * r):
        column = b[:larger, j // r, j % r]
        row = scales[j // n, j % n] * a[j // n, 0, :smaller] * gains[j % n]
        delta += 2 / 3 * torch.outer(column, row)
    delta = delta if inputs <= out else delta.T
    first, second = layer.get_scaled_bases("default")
    assert_close(second @ first, delta)
    for shape in ((inputs,), (2, 3, inputs)):
        x = torch.randn(shape)
        assert_close(layer(x) - layer.base_layer(x), x @ delta.T)
    merged = layer.get_delta_weight("default")
    assert_close(merged.T if isinstance(base, Conv1D) else merged, delta)


def test_gradients() -> None:
    """What is written by hand is the derivative."""
    factors = [torch.randn(shape, dtype=torch.double) for shape in ((3, 1, 4), (3, 2), (2, 4))]
    trained = [factor.requires_grad_() for factor in factors[1:]]
    assert torch.autograd.gradcheck(UniqueBaseGrad.apply, (factors[0].requires_grad_(False), *trained))


def test_bases_are_drawn_from_the_seed() -> None:
    """In bfloat16, piece by piece, each basis scaled to a deviation of 1."""
    net = linears(5, 8, 6)
    adapted(net, "0", "1", projection_prng_key=7, init_weights=True)
    generator = torch.Generator().manual_seed(7)

    def piece(*shape: int) -> torch.Tensor:
        bound = shape[-1] ** -0.5
        drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).bfloat16()
        return torch.where(drawn == torch.tensor(bound).bfloat16(), torch.tensor(-bound).bfloat16(), drawn)

    a = piece(3, 1, 8)
    b = torch.cat([piece(8, 1, 3) for _ in range(3)], dim=1)
    assert_equal(net[0].randlora_A["default"], (a / a.std()).float())
    assert_equal(net[1].randlora_B["default"], (b / b.std()).float())


def test_bases_of_any_version_of_torch() -> None:
    """What torch 2.13 draws in bfloat16, but for the upper bound, which only sizes like this one meet."""
    drawn = random_basis((500, 1, 32), torch.Generator().manual_seed(3))
    wide = torch.empty(500, 1, 32).uniform_(-(32**-0.5), 32**-0.5, generator=torch.Generator().manual_seed(3))
    rounded = wide.bfloat16()
    at_bound = rounded == torch.tensor(32**-0.5).bfloat16()
    assert at_bound.any()
    assert (drawn[at_bound] < 0).all()
    rounded[at_bound] *= -1
    assert_equal(drawn, rounded / rounded.std())


@pytest.mark.parametrize(("field", "q"), [("sparse", 3.0), ("very_sparse", 8**0.5)])
def test_sparse_bases(field: str, q: float) -> None:
    net = linears(5, 8, 6)
    adapted(net, "0", "1", **{field: True})
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("randlora_A", (3, 1, 8)), ("randlora_B", (8, 3, 3))):
        drawn = torch.rand(shape, generator=generator)
        signs = torch.where(drawn < 1 / (2 * q), -1.0, torch.where(drawn > 1 - 1 / (2 * q), 1.0, 0.0))
        assert_equal(getattr(net[0], name)["default"], signs / signs.std())


def test_a_sparse_basis_without_entries() -> None:
    """It has no deviation to be scaled by."""
    assert not sparse_basis((2, 1, 2), 1e6, torch.Generator().manual_seed(0)).any()


def test_fresh_adapter() -> None:
    base = linears(4, 6, 2)
    x = torch.randn(3, 4)
    expected = base(x)
    model = get_peft_model(base, RandLoraConfig(r=3, target_modules=["0", "1"]))
    assert_equal(model(x), expected)
    assert_equal(base[1].randlora_gamma["default"], torch.full((1, 2), 0.5))
    names = {f"base_model.model.{i}.randlora_{v}.default" for i in range(2) for v in ("lambda", "gamma")}
    assert trainable(model) == names


def test_keys() -> None:
    """Checkpoints have the bases once for the model and once for each layer, the model has them in one place."""
    net = linears(4, 6, 2)
    model = adapted(net, "0", "1")
    extra = {key for key in get_peft_model_state_dict(model) if key.endswith(("_A", "_B"))}
    assert extra == {f"base_model.{where}randlora_{v}" for where in ("", "model.0.", "model.1.") for v in "AB"}
    assert net[0].randlora_A is net[1].randlora_A is model.base_model.randlora_A


@pytest.mark.parametrize("save_projection", [True, False])
def test_second_adapter_is_what_it_is_alone(tmp_path: Path, save_projection: bool) -> None:
    """Its bases fit its own layers, and its rank may be smaller than that of the first."""
    torch.manual_seed(0)
    base = linears(4, 6, 3)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "0", "1", r=3, save_projection=save_projection)
    config = RandLoraConfig(r=2, target_modules=["1"], save_projection=save_projection, init_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    fresh = linears(4, 6, 3)
    fresh.load_state_dict(state)
    x = torch.randn(3, 4)
    assert_equal(PeftModel.from_pretrained(fresh, tmp_path / "second")(x), model.eval()(x))


@pytest.mark.parametrize("field", ["projection_prng_key", "save_projection"])
def test_adapters_agree(field: str) -> None:
    model = adapted(linears(4, 6), "0")
    with refused(model, PeftValueError, field):
        model.add_adapter("two", RandLoraConfig(target_modules=["0"], **{field: False if "save" in field else 7}))


def test_no_rank() -> None:
    base = linears(4, 6)
    with refused(base, PeftValueError, "r must be"):
        get_peft_model(base, RandLoraConfig(r=0, target_modules=["0"]))


def test_restart() -> None:
    net = linears(4, 6)
    adapted(net, "0", init_weights=True)
    nn.init.ones_(net[0].randlora_lambda["default"])
    net[0].reset_randlora_parameters("default")
    assert not net[0].randlora_lambda["default"].any()


@pytest.mark.parametrize("autocast", [True, False])
def test_starts_have_the_digits_of_the_base(autocast: bool) -> None:
    for start, gamma in ((True, 1 / 20), (False, 1 / 30)):
        base = linears(20, 30).bfloat16()
        torch.manual_seed(0)
        get_peft_model(
            base, RandLoraConfig(r=4, target_modules=["0"], init_weights=start), autocast_adapter_dtype=autocast
        )
        torch.manual_seed(0)
        scales = torch.zeros(4, 5) if start else torch.randn(4, 5)
        assert_equal(base[0].randlora_lambda["default"].float(), scales.bfloat16().float())
        assert_equal(base[0].randlora_gamma["default"].float(), torch.full((5, 20), gamma).bfloat16().float())
