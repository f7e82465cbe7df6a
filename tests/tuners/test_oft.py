# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OFT: the rotation is the paper's, on each kind of layer, and can be merged and taken out again."""

import copy
import math
from pathlib import Path

import pytest
import torch
from support.helpers import first_layer, gpt2, llama, seeded, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import MultiplicativeDropoutLayer, OFTRotationModule
from peft.tuners.oft.maths import cayley_neumann
from peft.utils.error import PeftNotImplementedError, PeftValueError


KINDS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "conv1d": (lambda: Conv1D(5, 12), (3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 4), stride=2, padding=1, dilation=(1, 2)), (2, 3, 9, 9)),
    "embedding": (lambda: nn.Embedding(7, 12), None),
}
CONFIGS = {
    "series": {},
    "exact": {"use_cayley_neumann": False},
    "shared": {"block_share": True},
    "constrained": {"coft": True, "eps": 0.1},
    "blocks": {"oft_block_size": 0, "r": 3},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def make(kind: str = "linear", **options: object) -> tuple[PeftModel, torch.Tensor]:
    """A model of one layer, in eval mode, and an input."""
    options = {"oft_block_size": 4, "init_weights": False, "target_modules": ["0"], **options}
    make_layer, shape = KINDS[kind]
    with seeded():
        model = get_peft_model(nn.Sequential(make_layer()), OFTConfig(**options))
        x = torch.arange(6).view(2, 3) if shape is None else torch.randn(shape)
    return model.eval(), x


def generator(entries: torch.Tensor, size: int) -> torch.Tensor:
    """One skew-symmetric matrix, entry by entry."""
    matrix = torch.zeros(size, size, dtype=entries.dtype)
    values = iter(entries)
    for i in range(size):
        for j in range(i + 1, size):
            matrix[i, j] = next(values)
            matrix[j, i] = -matrix[i, j]
    return matrix


def expected_rotation(weight: torch.Tensor, size: int, features: int, exact: bool) -> torch.Tensor:
    """What rows of inputs are multiplied by, as a full matrix."""
    blocks = []
    for entries in weight.detach():
        q, identity = generator(entries, size), torch.eye(size)
        if exact:
            blocks.append((identity - q) @ torch.linalg.inv(identity + q))
        else:
            powers = [torch.linalg.matrix_power(q, k) for k in range(5)]
            blocks.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4])
    return torch.block_diag(*(blocks * (features // size) if len(blocks) == 1 else blocks))


def rows_of(layer: nn.Module) -> torch.Tensor:
    """A weight with the features that are rotated in its columns."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight.flatten(1)


@each_kind
@each_config
def test_output_is_that_of_the_rotated_weight(kind: str, options: dict) -> None:
    model, x = make(kind, **options)
    layer = first_layer(model)
    output = model(x)
    weight = next(layer.adapter_parameters("default"))
    size, features = layer.oft_block_size["default"], layer.rows_to_rotate()
    rotation = expected_rotation(weight, size, features, exact=not options.get("use_cayley_neumann", True))
    base = copy.deepcopy(layer.get_base_layer())
    rows = rows_of(base) @ (rotation if kind == "embedding" else rotation.T)
    base.weight.data = (rows.T if kind == "conv1d" else rows.view_as(base.weight)).detach()
    torch.testing.assert_close(output, base(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default"), rotation, atol=1e-5, rtol=1e-5)


@each_kind
@each_config
def test_merging_is_exact_and_comes_undone(kind: str, options: dict) -> None:
    model, x = make(kind, **options)
    layer = first_layer(model)
    model.add_adapter("other", OFTConfig(oft_block_size=6, init_weights=False, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    before, adapted = layer.weight.clone(), model(x)
    layer.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)


@each_kind
def test_fresh_adapter_is_the_identity(kind: str) -> None:
    model, x = make(kind, init_weights=True)
    assert torch.equal(model(x), first_layer(model).get_base_layer()(x))


@each_kind
def test_gradients_reach_the_rotation_only(kind: str) -> None:
    model, x = make(kind)
    model(x).pow(2).mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    name = "oft_embedding_R" if kind == "embedding" else "oft_R"
    assert reached == {f"base_model.model.0.{name}.default.weight"}


def test_half_precision_agrees_with_full() -> None:
    model, x = make("linear")
    expected = model(x)
    half = model.to(torch.bfloat16)
    result = half(x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=3e-2, rtol=3e-2)


def test_saved_adapter_computes_the_same(tmp_path: Path) -> None:
    model, x = make("linear")
    model.save_pretrained(tmp_path)
    with seeded():
        again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 5)), tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_of_a_language_model(tied: bool) -> None:
    options = {"oft_block_size": 4, "init_weights": False, "target_modules": ["embed_tokens", "q_proj"]}
    model = get_peft_model(llama(tied=tied), OFTConfig(**options, ensure_weight_tying=tied)).eval()
    adapted = model(token_ids()).logits
    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    torch.testing.assert_close(merged(token_ids()).logits, adapted, atol=1e-5, rtol=1e-4)


def test_default_targets_of_gpt2() -> None:
    base = gpt2()
    expected = base(token_ids()).logits
    model = get_peft_model(base, OFTConfig(oft_block_size=8)).eval()
    torch.testing.assert_close(model(token_ids()).logits, expected, atol=1e-6, rtol=1e-5)


def test_exact_rotation_is_orthogonal() -> None:
    module = OFTRotationModule(3, 6, 4, 12, use_cayley_neumann=False).double()
    nn.init.normal_(module.weight)
    rotation = module.get_weight()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12, dtype=torch.float64))


def test_series_converges_to_the_rotation() -> None:
    q = 0.1 * generator(torch.ones(6, dtype=torch.float64), 4)
    identity = torch.eye(4, dtype=torch.float64)
    exact = (identity + q) @ torch.linalg.inv(identity - q)
    errors = [(cayley_neumann(q[None], terms)[0] - exact).norm().item() for terms in (4, 6, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_short_series_are_those_of_the_release() -> None:
    q = generator(torch.ones(6), 4)[None]
    assert torch.equal(cayley_neumann(q, 0), torch.eye(4)[None])
    assert torch.equal(cayley_neumann(q, 2), torch.eye(4) + 2 * q)
    assert torch.equal(cayley_neumann(q, 3), cayley_neumann(q, 4))


def test_constraint_holds_and_is_kept_by_small_steps() -> None:
    model, x = make("linear", coft=True, eps=0.01)
    model(x)
    weight = first_layer(model).oft_R["default"].weight
    norms = torch.stack([generator(entries, 4).norm() for entries in weight.detach()])
    torch.testing.assert_close(norms, torch.full((3,), 0.01 / math.sqrt(3)))
    inside = weight.detach().mul_(0.5).clone()
    model(x)
    assert torch.equal(weight, inside)


@pytest.mark.parametrize(
    ("p", "count", "dropped"), [(0.5, 10, 5), (0.25, 10, 2), (1.0, 10, 10), (1.0, 1, 0), (0, 9, 0)]
)
def test_dropout_drops_that_share_of_the_blocks(p: float, count: int, dropped: int) -> None:
    blocks = torch.full((count, 2, 2), 3.0)
    result = MultiplicativeDropoutLayer(p)(blocks)
    is_identity = (result == torch.eye(2)).all(dim=(1, 2))
    assert is_identity.sum() == dropped
    assert torch.equal(result[~is_identity], blocks[~is_identity])
    assert MultiplicativeDropoutLayer(p).eval()(blocks) is blocks


@each_kind
def test_dropout_is_for_training(kind: str) -> None:
    model, x = make(kind, module_dropout=1.0)
    layer, expected = first_layer(model), model(x)
    base = layer.get_base_layer()(x)
    assert not torch.allclose(expected, base)
    model.train()
    torch.testing.assert_close(model(x), base)
    layer.merge()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "used"),
    [({"oft_block_size": 5}, 4), ({"oft_block_size": 100}, 12), ({"oft_block_size": 0, "r": 5}, 3)],
)
def test_sizes_that_do_not_divide_are_adjusted(options: dict, used: int) -> None:
    with pytest.warns(UserWarning, match="does not divide the 12 features"):
        model, _ = make("linear", **options)
    assert first_layer(model).oft_block_size["default"] == used


@pytest.mark.parametrize("options", [{"r": 4}, {"oft_block_size": 0}, {"r": -1}, {"oft_block_size": -4}])
def test_one_of_size_and_number_is_needed(options: dict) -> None:
    with pytest.raises(ValueError, match="oft_block_size"):
        OFTConfig(**options)


def test_config_of_an_older_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no oft_block_size"):
        OFTConfig.check_kwargs(r=8)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(PeftValueError, match="init_weights"):
        make("linear", init_weights="bad")
    with pytest.raises(PeftNotImplementedError, match="groups=2"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), OFTConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="Conv1d"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), OFTConfig(target_modules=["0"]))


def test_scaling_warns_and_does_nothing() -> None:
    model, x = make("linear")
    layer, expected = first_layer(model), model(x)
    for rescale in (lambda: layer.scale_layer(2.0), lambda: layer.set_scale("default", 2.0), layer.unscale_layer):
        with pytest.warns(UserWarning, match="has no scale"):
            rescale()
    assert torch.equal(model(x), expected)


def test_wrong_layout_is_corrected() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model, _ = make("linear", fan_in_fan_out=True)
    assert model.peft_config["default"].fan_in_fan_out is False
