# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Matrices that have few coefficients after a Fourier transform: built, and multiplied without being built."""

import torch


def full_type(*tensors: torch.Tensor) -> torch.dtype:
    """Give the type that tensors are transformed in: transforms know no half precision."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def spectral_matrix(spectrum: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """
    Build the real part of the inverse transform of a matrix with few entries.

    Args:
        spectrum: the entries, (n,).
        places: their rows and columns, (2, n).
        shape: size of the matrix, (out, in).
    """
    (out, inputs), half = shape, shape[1] // 2
    entries = spectrum.to(full_type(spectrum)) / 2
    # the real part is the transform of the matrix and its mirror image, one half of which tells the other
    opposite = torch.stack((-places[0] % out, -places[1] % inputs))
    rows, columns = torch.cat((places, opposite), dim=1)
    values = entries.repeat(2).masked_fill(columns > half, 0)
    grid = entries.new_zeros(out, half + 1).index_put((rows, columns.clamp(max=half)), values, accumulate=True)
    return torch.fft.irfft2(grid, s=tuple(shape))


def is_worth_building(tokens: int, n: int, shape: tuple[int, int]) -> bool:
    """
    Say whether building the matrix and multiplying by it costs less than transforming inputs and outputs.

    Measured on a processor: a coefficient costs for each token what 256 entries of the matrix do, and building the
    matrix costs what multiplying 200 tokens by it does. The matrix is given preference up to twice the time, as it
    needs less memory.

    Args:
        tokens: how many rows are multiplied.
        n: how many coefficients there are.
        shape: size of the matrix, (out, in).
    """
    return 512 * n * tokens > shape[0] * shape[1] * (tokens + 200)


def spectral_product(
    x: torch.Tensor, spectrum: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """
    Multiply by the transpose of `spectral_matrix`, which is never built.

    A coefficient at (u, v) is a wave of frequency u along the outputs times one of frequency v along the inputs: the
    transform of an input tells how much of the latter there is in it, and an inverse transform makes the former.

    Args:
        x: inputs, (..., in).
        spectrum: the coefficients, (n,).
        places: their rows and columns, (2, n).
        shape: size of the matrix, (out, in).

    Returns:
        Outputs, (..., out), in float32 at least.
    """
    (out, inputs), (rows, columns) = shape, places
    dtype = full_type(x, spectrum)
    waves = torch.fft.fft(x.to(dtype)).index_select(-1, columns).conj() * spectrum.to(dtype)
    outputs = waves.new_zeros(*x.shape[:-1], out).index_add(-1, rows, waves)
    return torch.fft.ifft(outputs).real / inputs
