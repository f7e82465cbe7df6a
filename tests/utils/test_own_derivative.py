# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Functions that know their derivative: the same result whichever way they are called."""

import inspect
from typing import Any

import torch

from peft.utils.own_derivative import OwnDerivative


class Doubled(OwnDerivative):
    """Twice a tensor, with a derivative that tells that it was asked."""

    contexts = 0

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        Doubled.contexts += 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 20


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    Doubled.contexts = 0
    x = torch.ones(3)
    assert torch.equal(Doubled.of(x), x * 2)
    with torch.no_grad():
        assert torch.equal(Doubled.of(x.requires_grad_()), x * 2)
    assert Doubled.contexts == 0
    Doubled.of(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 20.0)) and Doubled.contexts == 1


def test_signature_is_known() -> None:
    assert Doubled.forward.__signature__ == inspect.Signature.from_callable(Doubled.forward)
    gradient = torch.func.grad(lambda x: Doubled.of(x).sum())(torch.ones(2))
    assert torch.equal(gradient, torch.full((2,), 20.0))
