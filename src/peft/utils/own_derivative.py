# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Functions that know their derivative, without what torch spends on each call of one."""

import inspect
from typing import Any

import torch


class OwnDerivative(torch.autograd.Function):
    """
    A function of tensors that knows its derivative; `forward` takes no context, and computes with plain operations.

    Example:

        >>> import torch
        >>> class Half(OwnDerivative):
        ...     @staticmethod
        ...     def forward(x):
        ...         return x / 2
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         pass
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return gradient / 2
        >>> Half.of(torch.ones(2)).requires_grad, Half.of(torch.ones(2, requires_grad=True)).requires_grad
        (False, True)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note the signature of the forward pass, for which torch looks in each call."""
        super().__init_subclass__(**kwargs)
        cls.forward.__signature__ = inspect.signature(cls.forward)

    @classmethod
    def of(cls, *arguments: Any) -> torch.Tensor:
        """
        Compute the function: by its forward pass alone where nobody wants a gradient.

        Args:
            arguments: those of `forward`.
        """
        wanted = (argument.requires_grad for argument in arguments if isinstance(argument, torch.Tensor))
        if torch.is_grad_enabled() and any(wanted):
            return cls.apply(*arguments)
        return cls.forward(*arguments)
