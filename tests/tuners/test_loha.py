# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoHa against the formula of the paper, its gradients, and its two ways to compute; see also `test_lycoris.py`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from peft import LoHaConfig, get_peft_model
from peft.tuners.loha.layer import (
    HadaWeight,
    HadaWeightCP,
    LoHaLayer,
    low_rank_factors,
    make_weight,
    make_weight_cp,
)


def adapted(base: nn.Module, **options: object) -> LoHaLayer:
    """Adapt one layer; nothing in the adapter is zero unless asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(base)
    get_peft_model(net, LoHaConfig(target_modules=["0"], **{"r": 3, "alpha": 6, "init_weights": False, **options}))
    return net[0]


def factors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_delta_of_linear_is_the_product_of_two_products() -> None:
    layer = adapted(nn.Linear(5, 4))
    a1, b1, a2, b2 = (getattr(layer, f"hada_{name}")["default"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    expected = torch.empty(4, 5)
    for o in range(4):
        for i in range(5):
            first = sum(a1[o, p] * b1[p, i] for p in range(3))
            second = sum(a2[o, p] * b2[p, i] for p in range(3))
            expected[o, i] = 6 / 3 * first * second
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("base", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (2, 3)), nn.Conv2d(4, 6, 3, groups=2)])
def test_delta_of_convolution_in_tucker_form(base: nn.Module) -> None:
    layer = adapted(base, use_effective_conv2d=True)
    out, per_group, *kernel = base.weight.shape
    products = []
    for n in (1, 2):
        core = getattr(layer, f"hada_t{n}")["default"].reshape(3, 3, *kernel)
        a, b = (getattr(layer, f"hada_w{n}_{side}")["default"] for side in "ab")
        assert a.shape == (3, out) and b.shape == (3, per_group)
        products.append(torch.tensordot(a.T, torch.tensordot(b.T, core, dims=[[1], [1]]), dims=[[1], [1]]))
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * products[0] * products[1])


def test_kernel_of_size_one_needs_no_core() -> None:
    layer = adapted(nn.Conv2d(4, 6, 1), use_effective_conv2d=True)
    assert not layer.hada_t1 and layer.hada_w1_a["default"].shape == (6, 3)


def test_delta_has_up_to_the_square_of_the_rank() -> None:
    assert torch.linalg.matrix_rank(adapted(nn.Linear(20, 20)).get_delta_weight("default")) == 9


def test_low_rank_factors_multiply_to_the_same() -> None:
    parts = factors((4, 3), (3, 5), (4, 3), (3, 5))
    left, right = low_rank_factors(*parts)
    assert left.shape == (4, 9)
    torch.testing.assert_close(left @ right, make_weight(*parts, 1.0))


def test_gradients_of_the_products() -> None:
    parts = factors((4, 2), (2, 3), (4, 2), (2, 3))
    scale = torch.tensor(1.7, dtype=torch.float64)
    assert gradcheck(lambda *parts: HadaWeight.apply(*parts, scale), parts)
    assert gradgradcheck(lambda *parts: HadaWeight.apply(*parts, 1.7), parts)


def test_gradients_of_the_products_in_tucker_form() -> None:
    parts = factors((2, 2, 3, 1), (2, 4), (2, 3), (2, 2, 3, 1), (2, 4), (2, 3))
    assert gradcheck(lambda *parts: HadaWeightCP.apply(*parts, 1.7), parts)
    assert gradgradcheck(lambda *parts: HadaWeightCP.apply(*parts, 1.7), parts)
    assert gradcheck(lambda *parts: make_weight_cp(*parts, torch.tensor(2.0)), parts)


def test_only_factors_are_kept_for_the_backward_pass() -> None:
    parts = [torch.randn(64, 2, requires_grad=True), torch.randn(2, 64, requires_grad=True)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        make_weight(*parts, *parts, 1.0)
    assert sum(kept) == 4 * 128


@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_every_way_to_compute_gives_the_same(tokens: int, training: bool, hooked: bool) -> None:
    layer = adapted(nn.Linear(32, 48), r=4)
    if hooked:  # a base layer with a hook has to be called
        layer.base_layer.register_forward_hook(lambda *args: None)
    weights = list(layer.adapter_parameters("default"))
    x, gradient = torch.randn(2, tokens, 32, requires_grad=True), torch.randn(2, tokens, 48)
    expected = F.linear(x, layer.weight + layer.get_delta_weight("default"), layer.bias)
    with torch.set_grad_enabled(training):
        result = layer(x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    if training:
        inputs = [x, *weights]
        wanted = torch.autograd.grad(expected, inputs, gradient)
        torch.testing.assert_close(torch.autograd.grad(result, inputs, gradient), wanted, atol=1e-3, rtol=1e-4)


def test_the_way_depends_on_the_number_of_tokens() -> None:
    layer = adapted(nn.Linear(64, 64), r=4)
    with torch.no_grad():
        ways = [layer.adds_to_weight("default", torch.empty(tokens, 64), apart=False) for tokens in (1, 10_000)]
    assert ways == [False, True]


def test_embedding_is_refused() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        adapted(nn.Embedding(4, 4))
