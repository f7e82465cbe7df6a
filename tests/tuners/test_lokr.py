# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoKr against the formula of the paper, and its way around the delta; see also `test_lycoris.py`."""

import pytest
import torch
from torch import nn

from peft import LoKrConfig, get_peft_model
from peft.tuners.lokr.layer import LoKrLayer, factorization, make_kron, make_weight_cp
from peft.tuners.tuners_utils import AdditiveLayer


def adapted(base: nn.Module, **options: object) -> LoKrLayer:
    """Adapt one layer; nothing in the adapter is zero unless asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(base)
    get_peft_model(net, LoKrConfig(target_modules=["0"], **{"r": 2, "alpha": 6, "init_weights": False, **options}))
    return net[0]


def shapes(layer: LoKrLayer) -> dict[str, tuple[int, ...]]:
    return {
        key.removeprefix("lokr_"): tuple(layer.state_dict()[live].shape) for key, live in layer.adapter_keys("default")
    }


def kron_by_hand(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Put one block next to the other."""
    return torch.cat([torch.cat([w1[a, b] * w2 for b in range(w1.shape[1])], dim=1) for a in range(w1.shape[0])])


@pytest.mark.parametrize("limit", [-1, 1, 3, 4, 7, 100])
def test_factorization(limit: int) -> None:
    for number in range(1, 130):
        first, second = factorization(number, limit)
        assert first * second == number
        if limit > 0 and number % limit == 0:
            assert first == limit
        else:
            fitting = [n for n in range(1, number + 1) if number % n == 0 and n <= number // n]
            assert first == max(n for n in fitting if limit < 0 or n <= limit)


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        (nn.Linear(64, 96), {}, {"w1": (8, 8), "w2_a": (12, 2), "w2_b": (2, 8)}),
        (nn.Linear(64, 96), {"r": 6}, {"w1": (8, 8), "w2": (12, 8)}),
        (
            nn.Linear(64, 96),
            {"decompose_both": True},
            {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (12, 2), "w2_b": (2, 8)},
        ),
        (nn.Linear(64, 96), {"decompose_factor": 4}, {"w1": (4, 4), "w2_a": (24, 2), "w2_b": (2, 16)}),
        (nn.Conv2d(16, 24, 3), {}, {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 36)}),
        (
            nn.Conv2d(16, 24, 3),
            {"use_effective_conv2d": True},
            {"w1": (4, 4), "w2_a": (2, 6), "w2_b": (2, 4), "t2": (2, 2, 3, 3)},
        ),
        (nn.Conv1d(8, 12, 3), {}, {"w1": (3, 2), "w2": (4, 4, 3)}),
        (
            nn.Conv1d(32, 48, 3),
            {"use_effective_conv2d": True, "r": 1},
            {"w1": (6, 4), "w2_a": (1, 8), "w2_b": (1, 8), "t2": (1, 1, 3, 1)},
        ),
    ],
)
def test_tensors_are_those_of_the_release(base: nn.Module, options: dict, expected: dict) -> None:
    assert shapes(adapted(base, **options)) == expected


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"r": 8}])
def test_delta_of_linear_is_a_kronecker_product(options: dict) -> None:
    layer = adapted(nn.Linear(64, 96), **options)
    tensors = {name: getattr(layer, f"lokr_{name}")["default"] for name in shapes(layer)}
    w1 = tensors["w1"] if "w1" in tensors else tensors["w1_a"] @ tensors["w1_b"]
    w2 = tensors["w2"] if "w2" in tensors else tensors["w2_a"] @ tensors["w2_b"]
    expected = 6 / options.get("r", 2) * kron_by_hand(w1, w2)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True}])
def test_delta_of_convolution_is_one_for_each_place_of_the_kernel(options: dict) -> None:
    layer = adapted(nn.Conv2d(16, 24, (2, 3)), **options)
    w1, a, b = (getattr(layer, f"lokr_{name}")["default"] for name in ("w1", "w2_a", "w2_b"))
    delta = layer.get_delta_weight("default")
    for y in range(2):
        for x in range(3):
            if options:
                w2 = a.T @ layer.lokr_t2["default"][..., y, x] @ b
            else:
                w2 = a @ b.view(2, 4, 2, 3)[..., y, x]
            torch.testing.assert_close(delta[..., y, x], 3 * kron_by_hand(w1, w2))


def test_pieces() -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
    torch.testing.assert_close(make_kron(w1, w2, 2.0), 2 * kron_by_hand(w1, w2))
    core, a, b = torch.randn(2, 3, 1, 2), torch.randn(2, 4), torch.randn(3, 5)
    torch.testing.assert_close(make_weight_cp(core, a, b)[..., 0, 1], a.T @ core[..., 0, 1] @ b)


@pytest.mark.parametrize(("init", "zero"), [(True, "w1"), ("lycoris", "w2_b"), (False, None)])
def test_what_starts_at_zero(init: bool | str, zero: str | None) -> None:
    layer = adapted(nn.Linear(64, 96), init_weights=init)
    zeros = [name for name in shapes(layer) if not getattr(layer, f"lokr_{name}")["default"].any()]
    assert zeros == ([zero] if zero else [])
    assert bool(layer.get_delta_weight("default").any()) == (zero is None)


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (nn.Linear(64, 96), (64,)),
        (nn.Linear(64, 96), (2, 3, 64)),
        (nn.Linear(64, 96), (0, 64)),
        (nn.Linear(1024, 1024), (2, 1024)),
        (nn.Conv1d(32, 48, 3), (2, 32, 9)),
        (nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="reflect"), (2, 16, 7, 6)),
        (nn.Conv2d(16, 24, (3, 5), dilation=2), (16, 9, 12)),
        (nn.Conv2d(256, 256, 3), (2, 256, 4, 5)),
    ],
)
def test_the_delta_is_not_built_in_the_forward_pass(
    base: nn.Module, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = adapted(base), torch.randn(*size)
    expected = base(x) + AdditiveLayer.delta_forward(layer, "default", x)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the delta was built")

    monkeypatch.setattr(LoKrLayer, "get_delta_weight", refuse)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [nn.Conv2d(16, 24, 3, groups=4), nn.Conv1d(8, 12, 3)])
def test_the_delta_is_built_where_channels_do_not_factor(base: nn.Module) -> None:
    layer, x = adapted(base), torch.randn(2, base.in_channels, *[7] * len(base.kernel_size))
    expected = base._conv_forward(x, base.weight + layer.get_delta_weight("default"), base.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
def test_rank_dropout_scales_what_it_leaves_if_asked(scaled: bool) -> None:
    layer = adapted(nn.Linear(64, 96), rank_dropout=0.5, rank_dropout_scale=scaled)
    full, dropped = layer.get_delta_weight("default"), layer.get_delta_weight("default", apply_rank_dropout=True)
    left = dropped.any(dim=1)
    assert 0 < left.sum() < 96
    factor = 96 / left.sum() if scaled else 1.0
    torch.testing.assert_close(dropped[left], full[left] * factor)
