# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Matrices of circulant blocks: built, and multiplied by way of Fourier transforms."""

from typing import Any

import torch


def get_circulant_fast(w: torch.Tensor) -> torch.Tensor:
    """
    Build a matrix of circulant blocks: entry (p, q) of a block is entry (q - p) modulo b of its kernel.

    Args:
        w: kernels, (rows of blocks, columns of blocks, b).

    Returns:
        The matrix, (rows * b, columns * b).

    Example:

        >>> import torch
        >>> from peft.tuners.c3a.utils import get_circulant_fast
        >>> get_circulant_fast(torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
        [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]]
    """
    rows, columns, size = w.shape
    places = torch.arange(size, device=w.device)
    blocks = w[..., (places - places[:, None]) % size]
    return blocks.transpose(1, 2).reshape(rows * size, columns * size)


def circular_convolution(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """
    Multiply by the transpose of a matrix of circulant blocks, which is never built.

    Args:
        x: inputs, (..., columns * b).
        w: kernels, (rows, columns, b).

    Returns:
        Outputs, (..., rows * b), in float32 at least: transforms know no half precision.
    """
    rows, columns, size = w.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    inputs = torch.fft.rfft(x.to(dtype).reshape(-1, columns, size)).permute(2, 0, 1)
    kernels = torch.fft.rfft(w.to(dtype)).conj().permute(2, 1, 0)
    products = (inputs @ kernels).permute(1, 2, 0)
    return torch.fft.irfft(products, n=size).reshape(*x.shape[:-1], rows * size)


class BlockCircularConvolution(torch.autograd.Function):
    """`circular_convolution` that keeps nothing but its arguments for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """
        Multiply.

        Args:
            ctx: keeps the arguments.
            x: inputs, (..., columns * b).
            w: kernels, (rows, columns, b).
        """
        ctx.save_for_backward(x, w)
        return circular_convolution(x, w)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give the gradients of inputs and kernels.

        Args:
            ctx: has the arguments.
            grad_output: gradient of the outputs.
        """
        with torch.enable_grad():
            arguments = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return torch.autograd.grad(circular_convolution(*arguments), arguments, grad_output)
