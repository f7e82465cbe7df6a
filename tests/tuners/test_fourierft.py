# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FourierFT against the formula of the paper, written as a sum of cosines."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import FourierFTConfig, get_peft_model
from peft.tuners.fourierft.layer import FourierFTLayer, FourierFTLinear
from peft.tuners.fourierft.maths import spectral_matrix, spectral_product


def adapted(base: nn.Module, **fields: object) -> FourierFTLayer:
    torch.manual_seed(0)
    net = nn.Sequential(base)
    get_peft_model(net, FourierFTConfig(target_modules=["0"], **{"n_frequency": 7, **fields}))
    return net[0]


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_delta_is_a_sum_of_cosines(base: nn.Module) -> None:
    layer = adapted(base, scaling=20.0)
    assert isinstance(layer, FourierFTLinear)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(777))[:7].tolist()
    expected = torch.empty(4, 6, dtype=torch.float64)
    for p in range(4):
        for q in range(6):
            waves = (
                c * math.cos(2 * math.pi * (i // 6 * p / 4 + i % 6 * q / 6))
                for c, i in zip(layer.fourierft_spectrum["default"].tolist(), chosen, strict=True)
            )
            expected[p, q] = 20 / 24 * sum(waves)
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ expected.T.float(), atol=1e-5, rtol=1e-4)


def test_layers_of_one_shape_have_the_same_places() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    config = FourierFTConfig(target_modules=["0", "1", "2"], n_frequency=5, n_frequency_pattern={"0": 9})
    get_peft_model(net, config)
    places = [layer.indices["default"] for layer in net]
    assert torch.equal(places[1], places[2])
    assert [layer.fourierft_n_frequency["default"] for layer in net] == [9, 5, 5]


def test_start() -> None:
    torch.manual_seed(3)
    drawn = torch.randn(7)
    base = nn.Linear(6, 4)
    torch.manual_seed(3)
    net = nn.Sequential(base)
    get_peft_model(net, FourierFTConfig(target_modules=["0"], n_frequency=7))
    assert torch.equal(net[0].fourierft_spectrum["default"], drawn)
    following = torch.rand(1)
    assert not adapted(nn.Linear(6, 4), init_weights=True).fourierft_spectrum["default"].any()
    torch.manual_seed(3)
    get_peft_model(nn.Sequential(base), FourierFTConfig(target_modules=["0"], n_frequency=7, init_weights=True))
    assert torch.equal(torch.rand(1), following)
    net[0].reset_fourier_parameters("default")
    assert not net[0].fourierft_spectrum["default"].any()


@pytest.mark.parametrize("n", [0, 25])
def test_number_that_does_not_fit_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="at most 24"):
        adapted(nn.Linear(6, 4), n_frequency=n)


def test_places_are_shown_and_not_saved() -> None:
    layer = adapted(nn.Linear(6, 4), random_loc_seed=5)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(5))[:7]
    assert list(layer.indices) == ["default"]
    assert torch.equal(layer.indices["default"], torch.stack((chosen // 6, chosen % 6)))
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "fourierft_spectrum.default"]
    with pytest.raises(KeyError):
        layer.indices["other"]


def test_biases_of_targets_are_trained() -> None:
    assert adapted(nn.Linear(6, 4), bias="fourier_only").base_layer.bias.requires_grad
    with pytest.raises(NotImplementedError, match="bias='fourier'"):
        adapted(nn.Linear(6, 4), bias="fourier")


@pytest.mark.parametrize("shape", [(6, 4), (5, 7)])
def test_product_without_the_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    places = torch.stack([torch.randint(size, (9,)) for size in shape])  # some of them more than once
    spectrum = torch.randn(9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    matrix = torch.zeros(shape, dtype=torch.float64).index_put(tuple(places), spectrum, accumulate=True)
    expected = x @ torch.fft.ifft2(matrix).real.T
    torch.testing.assert_close(spectral_product(x, spectrum, places, shape), expected)
    torch.testing.assert_close(x @ spectral_matrix(spectrum, places, shape).T, expected)
    torch.autograd.gradcheck(lambda x, spectrum: spectral_product(x, spectrum, places, shape), (x, spectrum))


def test_wide_layers_build_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(nn.Linear(256, 256)), torch.randn(3, 256)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    monkeypatch.delattr(torch.fft, "irfft2")
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert layer(x.requires_grad_()).requires_grad
