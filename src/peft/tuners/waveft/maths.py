# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Wavelets: their filters, and one level of the transform of signals and matrices and back."""

import json
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...utils.error import PeftValueError
from .config import WAVELET_REDUCTIONS


# ------------------------------------------------------------------------------------------------------------ filters
@lru_cache(maxsize=1)
def _tables() -> dict[str, list[float]]:
    """Read the filters that no formula gives."""
    return json.loads(Path(__file__).with_name("filters.json").read_text(encoding="utf-8"))


def daubechies(order: int) -> torch.Tensor:
    """
    Compute the low-pass filter with the most vanishing moments for its length, the one of minimal phase.

    The square of its frequency response is known: (1 - y)^N times a polynomial in y = sin(w/2)^2 that is positive
    everywhere, and so has a logarithm. What is left of the response of minimal phase is the exponential of that part
    of its logarithm's Fourier series which belongs to positive times.

    Args:
        order: number of vanishing moments, N.

    Returns:
        The filter, (2 N,), in float64.

    Example:

        >>> from peft.tuners.waveft.maths import daubechies
        >>> [round(value, 4) for value in daubechies(2).tolist()]
        [0.483, 0.8365, 0.2241, -0.1294]
    """
    size = 4096  # frequencies; what goes round the end is below the digits of float64
    w = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    y = torch.sin(w / 2) ** 2
    square = sum(float(math.comb(order - 1 + k, k)) * y**k for k in range(order))
    series = torch.fft.ifft(square.log() / 2).real
    series[1 : size // 2] *= 2
    series[size // 2 + 1 :] = 0
    zeros = ((1 + torch.polar(torch.ones_like(w), -w)) / 2) ** order
    response = zeros * torch.exp(torch.fft.fft(series))
    return math.sqrt(2) * torch.fft.ifft(response).real[: 2 * order]


@cache
def filters_of(name: str) -> torch.Tensor:
    """
    Give the filters from which a signal is put together again.

    Args:
        name: name of the wavelet, such as "db4".

    Returns:
        The low-pass and the high-pass filter, (2, L), in float64.
    """
    if name not in WAVELET_REDUCTIONS:
        raise PeftValueError(f"there is no wavelet {name!r}; wavelist() names those that there are")
    family, order = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    with torch.inference_mode(False), torch.device("cpu"):
        if family == "db" or (family == "sym" and order < 4):
            low = daubechies(order)
        else:
            low = torch.tensor(_tables()[name], dtype=torch.float64)
        signs = torch.ones_like(low)
        signs[1::2] = -1
        return torch.stack((low, low.flip(0) * signs))


def wavelist() -> list[str]:
    """Name the wavelets."""
    return list(WAVELET_REDUCTIONS)


class Wavelet:
    """
    The filters of a wavelet, as lists of numbers.

    Args:
        name: its name, one of `wavelist()`.

    Example:

        >>> from peft.tuners.waveft.wavelet import Wavelet
        >>> len(Wavelet("sym4"))
        8
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._filters = filters_of(name)

    def __len__(self) -> int:
        return self.rec_len

    @property
    def rec_lo(self) -> list[float]:
        """Low-pass filter to put a signal together."""
        return self._filters[0].tolist()

    @property
    def rec_hi(self) -> list[float]:
        """High-pass filter to put a signal together."""
        return self._filters[1].tolist()

    @property
    def dec_lo(self) -> list[float]:
        """Low-pass filter to take a signal apart."""
        return self.rec_lo[::-1]

    @property
    def dec_hi(self) -> list[float]:
        """High-pass filter to take a signal apart."""
        return self.rec_hi[::-1]

    @property
    def rec_len(self) -> int:
        """Length of the filters that put together."""
        return self._filters.shape[1]

    @property
    def dec_len(self) -> int:
        """Length of the filters that take apart."""
        return self._filters.shape[1]

    @property
    def filter_bank(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """The four filters."""
        return self.dec_lo, self.dec_hi, self.rec_lo, self.rec_hi


# ---------------------------------------------------------------------------------------------------------- transforms
def grid_size(shape: Sequence[int], filters: torch.Tensor | None) -> tuple[int, ...]:
    """
    Give the numbers of coefficients along the axes, those of both filters together.

    Args:
        shape: size of the signal or matrix.
        filters: both filters, (2, L); None for coefficients that are not transformed.
    """
    return tuple(shape) if filters is None else tuple(size + filters.shape[1] - 2 + size % 2 for size in shape)


def synthesise(y: torch.Tensor, filters: torch.Tensor | None, features: int) -> torch.Tensor:
    """
    Put signals together from their coefficients.

    Args:
        y: coefficients, (..., h + h): those of the low-pass filter before those of the high-pass filter.
        filters: both filters, (2, L); None for coefficients that are not transformed.
        features: length of the signals; what is beyond it is left out.

    Returns:
        Signals, (..., features).
    """
    if filters is None:
        return y
    start = filters.shape[1] - 2
    signals = F.conv_transpose1d(y.reshape(-1, 2, y.shape[-1] // 2), filters[:, None], stride=2)
    return signals[:, 0, start : start + features].reshape(*y.shape[:-1], features)


def analyse(x: torch.Tensor, filters: torch.Tensor | None) -> torch.Tensor:
    """
    Do the transpose of `synthesise`: take signals apart.

    Args:
        x: signals, (..., features).
        filters: both filters, (2, L); None for coefficients that are not transformed.

    Returns:
        Coefficients, (..., h + h).
    """
    if filters is None:
        return x
    features, start = x.shape[-1], filters.shape[1] - 2
    (total,) = grid_size((features,), filters)
    padded = F.pad(x.reshape(-1, 1, features), (start, total - features))
    return F.conv1d(padded, filters[:, None], stride=2).reshape(*x.shape[:-1], total)


def synthesise_matrix(y: torch.Tensor, filters: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
    """
    Put a matrix together from its coefficients, along its rows and along its columns.

    Args:
        y: coefficients, (..., H, K).
        filters: both filters, (2, L); None for coefficients that are not transformed.
        shape: size of the matrix.
    """
    return synthesise(synthesise(y, filters, shape[1]).mT, filters, shape[0]).mT


# -------------------------------------------------------------------------------------------------- a few coefficients
def draw_places(shape: tuple[int, int], n: int, seed: int) -> torch.Tensor:
    """
    Draw places in a matrix, no two of them the same.

    Args:
        shape: size of the matrix.
        n: how many.
        seed: of the draw.

    Returns:
        Rows and columns, (2, n).
    """
    chosen = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack((chosen // shape[1], chosen % shape[1]))


def places_of(indices: torch.Tensor, shape: tuple[int, int], filters: torch.Tensor) -> torch.Tensor:
    """
    Give the places, among the coefficients of a matrix, of numbers that are placed as if in the matrix itself.

    The grid of coefficients is larger than the matrix, which stands in its middle. In its upper right quarter numbers
    count as high in the rows and low in the columns, and in the lower left one the other way round.

    Args:
        indices: rows and columns in the matrix, (2, n).
        shape: size of the matrix.
        filters: both filters, (2, L).

    Returns:
        Rows and columns in the grid of coefficients, (2, n), with the low ones first along rows and columns.
    """
    sizes = torch.tensor(grid_size(shape, filters))[:, None]
    shifted = indices + (sizes - torch.tensor(shape)[:, None]) // 2
    is_high = (shifted >= sizes // 2).long()
    return shifted + (is_high.flip(0) - is_high) * (sizes // 2)


def scatter(values: torch.Tensor, places: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """
    Put numbers into a matrix of zeros.

    Args:
        values: the numbers, (n,).
        places: their rows and columns, (2, n).
        size: size of the matrix.
    """
    return values.new_zeros(size).index_put(tuple(places), values)


def sparse_product(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """
    Multiply by the transpose of a sparse matrix.

    Args:
        x: inputs, (..., K).
        values: entries of the matrix, (n,).
        places: their rows and columns, (2, n).
        size: size of the matrix, (H, K).

    Returns:
        Outputs, (..., H).
    """
    if values.numel() * 256 > size[0] * size[1]:  # one product costs less than that many numbers one by one
        return F.linear(x, scatter(values, places, size))
    rows, columns = places
    return x.new_zeros(*x.shape[:-1], size[0]).index_add(-1, rows, x.index_select(-1, columns) * values)


def are_few(values: torch.Tensor, filters: torch.Tensor, shape: Sequence[int]) -> bool:
    """
    Say whether adding wavelets one by one costs less than putting a matrix together from all coefficients.

    Args:
        values: coefficients that are not zero, (n,).
        filters: both filters, (2, L).
        shape: size of the matrix.
    """
    return 4 * values.numel() * filters.shape[1] ** 2 < shape[0] * shape[1]


def sum_of_wavelets(
    values: torch.Tensor, places: torch.Tensor, filters: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """
    Put a matrix together from few coefficients, as `synthesise_matrix` does from all.

    A coefficient adds a patch of L x L numbers, the product of the filters that belong to its row and its column.

    Args:
        values: coefficients, (n,).
        places: their rows and columns among all coefficients, (2, n).
        filters: both filters, (2, L).
        shape: size of the matrix.
    """
    taps = filters.shape[1]
    halves = torch.tensor(grid_size(shape, filters), device=places.device)[:, None] // 2
    patches = filters[(places >= halves).long()]  # (2, n, L)
    steps = torch.arange(taps, device=places.device)
    rows, columns = (2 * (places % halves) - (taps - 2)).unsqueeze(-1) + steps
    inside = ((rows >= 0) & (rows < shape[0])).unsqueeze(2) & ((columns >= 0) & (columns < shape[1])).unsqueeze(1)
    entries = (values[:, None, None] * patches[0].unsqueeze(2) * patches[1].unsqueeze(1))[inside]
    flat = (rows.unsqueeze(2) * shape[1] + columns.unsqueeze(1))[inside]
    return values.new_zeros(shape[0] * shape[1]).index_add(0, flat, entries).view(tuple(shape))


def matrix_of(
    values: torch.Tensor, places: torch.Tensor, filters: torch.Tensor | None, shape: Sequence[int]
) -> torch.Tensor:
    """
    Put a matrix together from some coefficients, in the way that costs less.

    Args:
        values: coefficients, (n,).
        places: their rows and columns among all coefficients, (2, n).
        filters: both filters, (2, L); None for coefficients that are not transformed.
        shape: size of the matrix.
    """
    if filters is not None and are_few(values, filters, shape):
        return sum_of_wavelets(values, places, filters, shape)
    return synthesise_matrix(scatter(values, places, grid_size(shape, filters)), filters, shape)


# ------------------------------------------------------------------------------------------------ names of the release
class WaveletDetailTuple2d(NamedTuple):
    """
    Coefficients of one level: high in the rows, in the columns, and in both.

    Attributes:
        horizontal: high-pass along the axis of rows, the second to last one.
        vertical: high-pass along the axis of columns, the last one.
        diagonal: high-pass along both.
    """

    horizontal: torch.Tensor
    vertical: torch.Tensor
    diagonal: torch.Tensor


class WaveletTensorTuple(NamedTuple):
    """Filters of a wavelet as tensors; the attributes are named as those of `Wavelet`."""

    dec_lo: torch.Tensor
    dec_hi: torch.Tensor
    rec_lo: torch.Tensor
    rec_hi: torch.Tensor

    @classmethod
    def from_wavelet(cls, wavelet: Wavelet, dtype: torch.dtype) -> "WaveletTensorTuple":
        """
        Take the filters of a wavelet.

        Args:
            wavelet: what has the filters.
            dtype: type of the tensors.
        """
        return cls(*(torch.tensor(values, dtype=dtype) for values in wavelet.filter_bank))


def waverec2d(
    coeffs: Sequence[torch.Tensor | WaveletDetailTuple2d],
    wavelet: Wavelet | str,
    axes: tuple[int, int] = (-2, -1),
) -> torch.Tensor:
    """
    Put a matrix together from its coefficients.

    Args:
        coeffs: the coarsest approximation, and then the details of each level, the coarsest first.
        wavelet: the wavelet or its name.
        axes: those of rows and columns.

    Returns:
        The matrix; where a level has an odd size the last row or column is one too many, as the coefficients do not
        tell it.
    """
    name = wavelet if isinstance(wavelet, str) else wavelet.name
    matrix = coeffs[0].movedim(axes, (-2, -1))
    filters = filters_of(name).to(matrix)
    for details in coeffs[1:]:
        horizontal, vertical, diagonal = (detail.movedim(axes, (-2, -1)) for detail in details)
        matrix = matrix[..., : diagonal.shape[-2], : diagonal.shape[-1]]
        upper, lower = torch.cat((matrix, vertical), -1), torch.cat((horizontal, diagonal), -1)
        grid = torch.cat((upper, lower), -2)
        matrix = synthesise_matrix(grid, filters, [size + 2 - filters.shape[1] for size in grid.shape[-2:]])
    return matrix.movedim((-2, -1), axes)
