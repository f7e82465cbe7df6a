# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HRA: the weight is reflected as in the paper, on each kind of layer, and back again."""

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import first_layer, llama, seeded, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import HRAConfig, PeftModel, get_peft_model
from peft.tuners.hra.maths import orthogonal_reflections, reflections
from peft.utils.error import PeftNotImplementedError, PeftValueError


KINDS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "conv1d": (lambda: Conv1D(5, 12), (3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 4), stride=2, padding=1, dilation=(1, 2)), (2, 3, 9, 9)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_order = pytest.mark.parametrize("orthogonal", [False, True])


def make(kind: str = "linear", **options: object) -> tuple[PeftModel, torch.Tensor]:
    """A model of one layer, in eval mode, and an input."""
    options = {"r": 3, "init_weights": False, "target_modules": ["0"], **options}
    make_layer, shape = KINDS[kind]
    with seeded():
        model = get_peft_model(nn.Sequential(make_layer()), HRAConfig(**options))
        return model.eval(), torch.randn(shape)


def expected_product(directions: torch.Tensor, orthogonal: bool) -> torch.Tensor:
    """H_1 H_2 ... H_r, one reflection after the other."""
    product = torch.eye(len(directions), dtype=directions.dtype)
    used: list[torch.Tensor] = []
    for u in directions.T:
        for earlier in used if orthogonal else ():
            u = u - (u @ earlier) * earlier
        used.append(u / u.norm())
        product = product @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(used[-1], used[-1]))
    return product


@each_kind
@each_order
def test_output_is_that_of_the_reflected_weight(kind: str, orthogonal: bool) -> None:
    model, x = make(kind, apply_GS=orthogonal)
    layer = first_layer(model)
    product = expected_product(layer.hra_u["default"].detach(), orthogonal)
    base = copy.deepcopy(layer.get_base_layer())
    rows = (base.weight.T if kind == "conv1d" else base.weight.flatten(1)) @ product
    base.weight.data = (rows.T if kind == "conv1d" else rows.view_as(base.weight)).detach()
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default"), product, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default", reverse=True), product.T, atol=1e-5, rtol=1e-5)


@each_kind
@each_order
def test_merging_is_exact_and_comes_undone(kind: str, orthogonal: bool) -> None:
    model, x = make(kind, apply_GS=orthogonal)
    layer = first_layer(model)
    model.add_adapter("other", HRAConfig(r=2, init_weights=False, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    before, adapted = layer.weight.clone(), model(x)
    layer.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, atol=1e-5, rtol=0)


@each_kind
def test_fresh_adapter_is_the_identity(kind: str) -> None:
    model, x = make(kind, r=4, init_weights=True)
    torch.testing.assert_close(model(x), first_layer(model).get_base_layer()(x), atol=1e-5, rtol=1e-5)


def test_odd_number_warns_and_starts_at_random() -> None:
    with pytest.warns(UserWarning, match="r=3 is odd"):
        model, x = make(r=3, init_weights=True)
    assert not torch.allclose(model(x), first_layer(model).get_base_layer()(x))


@pytest.mark.filterwarnings("error")
def test_fresh_orthogonal_adapter_can_be_trained() -> None:
    model, x = make(r=4, init_weights=True, apply_GS=True)
    model(x).pow(2).mean().backward()
    gradient = first_layer(model).hra_u["default"].grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


@each_order
def test_gradients_are_those_of_the_plain_product(orthogonal: bool) -> None:
    with seeded():
        directions = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(4, 6, dtype=torch.float64)
    product = orthogonal_reflections if orthogonal else reflections
    (ours,) = torch.autograd.grad(product(directions)(rows).pow(3).sum(), directions)
    (plain,) = torch.autograd.grad((rows @ expected_product(directions, orthogonal)).pow(3).sum(), directions)
    torch.testing.assert_close(ours, plain)


def test_direction_of_length_zero_reflects_nothing() -> None:
    rows = torch.randn(2, 4)
    directions = torch.zeros(4, 1, requires_grad=True)
    result = reflections(directions)(rows)
    result.sum().backward()
    assert torch.equal(result, rows)
    assert directions.grad.isfinite().all()


@each_kind
def test_gradients_reach_the_directions_only(kind: str) -> None:
    model, x = make(kind)
    model(x).pow(2).mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"base_model.model.0.hra_u.default"}


def test_half_precision_agrees_with_full() -> None:
    model, x = make()
    expected = model(x)
    result = model.to(torch.bfloat16)(x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=3e-2, rtol=3e-2)


def test_saved_adapter_computes_the_same(tmp_path: Path) -> None:
    model, x = make()
    model.save_pretrained(tmp_path)
    with seeded():
        again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 5)), tmp_path)
    assert torch.equal(again(x), model(x))


def test_tied_head_and_embedding_stay_one() -> None:
    config = HRAConfig(r=3, init_weights=False, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config).eval()
    adapted = model(token_ids()).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(token_ids()).logits, adapted, atol=1e-5, rtol=1e-4)


def test_what_cannot_work_is_refused() -> None:
    for r in (0, -1):
        with pytest.raises(PeftValueError, match="at least 1"):
            make(r=r)
    with pytest.raises(PeftNotImplementedError, match="groups=2"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), HRAConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), HRAConfig(target_modules=["0"]))


def test_scaling_warns_and_does_nothing() -> None:
    model, x = make()
    layer, expected = first_layer(model), model(x)
    for rescale in (lambda: layer.scale_layer(2.0), layer.unscale_layer):
        with pytest.warns(UserWarning, match="has no scale"):
            rescale()
    assert torch.equal(model(x), expected)
