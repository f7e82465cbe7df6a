# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""WaveFT against wavelets that are written into a matrix one by one."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import WaveFTConfig, get_peft_model
from peft.tuners.waveft import maths
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.layer import WaveFTLayer
from peft.tuners.waveft.maths import filters_of
from peft.tuners.waveft.wavelet import Wavelet, wavelist
from peft.tuners.waveft.waverec2d import WaveletDetailTuple2d, WaveletTensorTuple, waverec2d


def adapted(base: nn.Module, **fields: object) -> WaveFTLayer:
    torch.manual_seed(0)
    net = nn.Sequential(base)
    config = WaveFTConfig(target_modules=["0"], **{"n_frequency": 5, "init_weights": False, "scaling": 2.0, **fields})
    get_peft_model(net, config)
    return net[0]


def sum_of_wavelets(layer: WaveFTLayer, out: int, inputs: int) -> torch.Tensor:
    """Add up the wavelets of a layer, each of them an outer product of two filters."""
    low, high = (torch.tensor(f) for f in (layer_wavelet(layer).rec_lo, layer_wavelet(layer).rec_hi))
    length = len(low)
    h, k = (-(-(size + length - 2) // 2) for size in (out, inputs))
    matrix = torch.zeros(2 * h + length, 2 * k + length)
    for c, u, v in zip(
        layer.waveft_spectrum["default"].tolist(), *layer.waveft_indices["default"].tolist(), strict=True
    ):
        u, v = u + (2 * h - out) // 2, v + (2 * k - inputs) // 2
        in_rows, in_columns = v >= k, u >= h  # the quarter on the right is high in the rows
        row, column = 2 * (u % h), 2 * (v % k)
        wave = torch.outer(high if in_rows else low, high if in_columns else low)
        matrix[row : row + length, column : column + length] += 2.0 * c * wave
    return matrix[length - 2 : length - 2 + out, length - 2 : length - 2 + inputs]


def layer_wavelet(layer: WaveFTLayer) -> Wavelet:
    return Wavelet(layer.waveft_wavelet_family["default"])


@pytest.mark.parametrize("n", [3, 50])
@pytest.mark.parametrize("family", ["db1", "db3", "sym4", "coif1"])
@pytest.mark.parametrize(("out", "inputs"), [(32, 26), (33, 26), (31, 29)])
def test_delta_is_a_sum_of_wavelets(out: int, inputs: int, family: str, n: int) -> None:
    layer = adapted(nn.Linear(inputs, out), wavelet_family=family, n_frequency=n)
    expected, x = sum_of_wavelets(layer, out, inputs), torch.randn(2, 3, inputs)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ expected.T, atol=1e-5, rtol=1e-4)


def test_conv1d_is_transposed() -> None:
    layer, x = adapted(Conv1D(4, 6)), torch.randn(3, 6)
    torch.testing.assert_close(layer.get_delta_weight("default").T, sum_of_wavelets(layer, 4, 6))
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("n", [3, 50])
def test_without_a_transform_coefficients_are_entries(n: int) -> None:
    layer, x = adapted(nn.Linear(32, 32), use_idwt=False, n_frequency=n), torch.randn(3, 32)
    chosen = torch.randperm(1024, generator=torch.Generator().manual_seed(777))[:n]
    delta = torch.zeros(1024)
    delta[chosen] = 2.0 * layer.waveft_spectrum["default"].detach()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.view(32, 32).T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [3, 50])
def test_gradients(n: int) -> None:
    layer = adapted(nn.Linear(31, 32), wavelet_family="db2", n_frequency=n).double()
    x, spectrum = torch.randn(2, 31, dtype=torch.float64), layer.waveft_spectrum["default"]
    found = torch.autograd.grad(layer(x).square().sum(), spectrum)[0]
    dense = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(found, torch.autograd.grad(dense.square().sum(), spectrum)[0])


@pytest.mark.parametrize("name", WAVELET_REDUCTIONS)
def test_shifted_filters_are_orthonormal(name: str) -> None:
    low, high = filters_of(name)
    length = len(low)
    assert WAVELET_REDUCTIONS[name] == (length - 2, length - 2)
    assert math.isclose(low.sum(), math.sqrt(2), rel_tol=1e-9)
    for shift in range(0, length, 2):
        expected = torch.eye(2, dtype=torch.float64) if shift == 0 else torch.zeros(2, 2, dtype=torch.float64)
        ahead, behind = (torch.stack((low, high))[:, part] for part in (slice(shift, None), slice(length - shift)))
        torch.testing.assert_close(ahead @ behind.T, expected, atol=2e-10, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 5, 20, 38])
def test_moments_of_daubechies_wavelets_vanish(order: int) -> None:
    high = filters_of(f"db{order}")[1]
    places = torch.linspace(-1, 1, 2 * order, dtype=torch.float64)
    for power in range(order):
        assert abs(high @ places**power) < 1e-12


def test_names_of_the_release() -> None:
    assert len(wavelist()) == 74
    wavelet = Wavelet("db2")
    tensors = WaveletTensorTuple.from_wavelet(wavelet, torch.float64)
    assert tensors.dec_lo.tolist() == wavelet.rec_lo[::-1]
    approximation, *details = torch.randn(4, 5, 6, dtype=torch.float64)
    flat = waverec2d([torch.ones_like(approximation), WaveletDetailTuple2d(*(0 * d for d in details))], "db2")
    torch.testing.assert_close(flat, torch.full((8, 10), 0.5, dtype=torch.float64))
    one = torch.zeros_like(approximation)
    one[2, 3] = 1
    expected = torch.zeros(8, 10, dtype=torch.float64)
    expected[2:6, 4:8] = torch.outer(torch.tensor(wavelet.rec_lo), torch.tensor(wavelet.rec_hi))
    torch.testing.assert_close(waverec2d([0 * one, (0 * one, one, 0 * one)], wavelet), expected)
    both = waverec2d([approximation.T, tuple(d.T for d in details)], wavelet, axes=(-1, -2))
    torch.testing.assert_close(both.T, waverec2d([approximation, tuple(details)], wavelet))
    with pytest.raises(ValueError, match="db39"):
        Wavelet("db39")


def test_proportional_sizes() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 30))
    config = WaveFTConfig(
        target_modules=["0", "1", "2"], n_frequency=7, n_frequency_pattern={"0": 2}, proportional_parameters=True
    )
    get_peft_model(net, config)
    expected = [max(1, round(21 * size / 160)) for size in (24, 16, 120)]
    assert [layer.waveft_spectrum["default"].numel() for layer in net] == expected
    assert [layer.waveft_n_frequency["default"] for layer in net] == expected


def test_start() -> None:
    base = nn.Linear(6, 4)
    torch.manual_seed(0)
    drawn = torch.randn(5) * 0.01
    assert torch.equal(adapted(base).waveft_spectrum["default"], drawn)
    layer = adapted(nn.Linear(6, 4))
    layer.reset_wave_parameters("default")
    assert not layer.waveft_spectrum["default"].any()
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "waveft_spectrum.default"]


@pytest.mark.parametrize("n", [0, 25])
@pytest.mark.parametrize("proportional", [False, True])
def test_number_that_does_not_fit_is_refused(n: int, proportional: bool) -> None:
    if n or not proportional:  # a proportional number is 1 at least
        with pytest.raises(ValueError, match="at most 24"):
            adapted(nn.Linear(6, 4), n_frequency=n, proportional_parameters=proportional)


@pytest.mark.parametrize("family", ["haar", "DB1", "db39", "sym1"])
def test_unknown_wavelets_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="wavelet_family must be one of"):
        WaveFTConfig(wavelet_family=family)


@pytest.mark.parametrize("family", ["db1", "sym2", "db4"])
@pytest.mark.parametrize("shape", [(9, 8), (16, 31)])
def test_sum_of_wavelets_is_the_matrix_of_all_coefficients(family: str, shape: tuple[int, int]) -> None:
    filters = maths.filters_of(family).double()
    places = maths.places_of(maths.draw_places(shape, 12, seed=0), shape, filters)
    values = torch.randn(12, dtype=torch.float64, requires_grad=True)
    grid = maths.scatter(values, places, maths.grid_size(shape, filters))
    expected = maths.synthesise_matrix(grid, filters, shape)
    torch.testing.assert_close(maths.sum_of_wavelets(values, places, filters, shape), expected)
    torch.autograd.gradcheck(lambda values: maths.sum_of_wavelets(values, places, filters, shape), values)
