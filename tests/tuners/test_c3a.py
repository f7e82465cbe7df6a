# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""C3A against circulant matrices that are written down entry by entry."""

import pytest
import torch
from torch import nn

from peft import C3AConfig, get_peft_model
from peft.tuners.c3a.layer import C3ALayer
from peft.tuners.c3a.maths import circular_convolution
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast


def adapted(base: nn.Module, **fields: object) -> C3ALayer:
    net = nn.Sequential(base)
    get_peft_model(net, C3AConfig(**{"target_modules": ["0"], "block_size": 4, **fields}))
    return net[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_are_circulant(size: int) -> None:
    w = torch.randn(2, 3, size, dtype=torch.float64)
    matrix = get_circulant_fast(w)
    for row in range(2 * size):
        for column in range(3 * size):
            expected = w[row // size, column // size, (column % size - row % size) % size]
            assert matrix[row, column] == expected
    x = torch.randn(5, 2, 3 * size, dtype=torch.float64)
    torch.testing.assert_close(circular_convolution(x, w), x @ matrix.T)


@pytest.mark.parametrize("function", [circular_convolution, BlockCircularConvolution.apply])
def test_gradients_of_inputs_and_kernels(function) -> None:
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, w))


def test_the_term_is_divided_by_the_inputs() -> None:
    layer, x = adapted(nn.Linear(12, 8)), torch.randn(3, 12)
    expected = x @ get_circulant_fast(layer.c3a_kernel["default"]).T / 12
    torch.testing.assert_close(layer(x) - layer.base_layer(x), expected)


@pytest.mark.parametrize(
    ("start", "bound"), [("xavier_uniform", (6 / 20) ** 0.5), (False, (6 / 20) ** 0.5), ("kaiming_uniform", 12**-0.5)]
)
def test_uniform_starts(start: str | bool, bound: float) -> None:
    base = nn.Linear(12, 8)
    torch.manual_seed(1)
    kernel = adapted(base, init_weights=start).c3a_kernel["default"]
    torch.manual_seed(1)
    assert torch.equal(kernel, torch.empty(2, 3, 4).uniform_(-bound, bound))


def test_other_starts() -> None:
    layer = adapted(nn.Linear(12, 8), init_weights=True)
    assert not layer.c3a_kernel["default"].any()
    torch.manual_seed(1)
    layer.reset_c3a_parameters("default", "gaussian")
    torch.manual_seed(1)
    assert torch.equal(layer.c3a_kernel["default"], torch.randn(2, 3, 4))


@pytest.mark.parametrize("fields", [{"block_size": 5}, {"block_size": 0}, {"init_weights": None}])
def test_refused(fields: dict) -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(ValueError, match=next(iter(fields))):
        get_peft_model(net, C3AConfig(**{"target_modules": ["0"], "block_size": 4, **fields}))
    assert type(net[0]) is nn.Linear
