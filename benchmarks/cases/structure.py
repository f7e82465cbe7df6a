# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods whose deltas have a structure, on a wide layer, where that is what counts."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from case import Row, case, ours, released
from measuring import best_of
from torch import nn

from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


WIDTH, TOKENS = 2048, 256
STRUCTURED = ("C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "RANDLORA", "WAVEFT")


def measure(method: str) -> Iterator[dict[str, float]]:
    """One Linear layer 2048 x 2048: forward and backward, also for the layer before it."""
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0"]))
    x, gradient = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)

    def step() -> None:
        base.zero_grad()
        x.grad = None
        base(x).backward(gradient)

    step()
    while True:
        (seconds,) = best_of(2, step)
        yield {"step": seconds}


def enter(method: str) -> Callable[[], Iterator[dict[str, float]]]:
    """Enter the case of a method."""
    start = partial(measure, method)
    start.__doc__ = measure.__doc__
    title = f"{method}: forward and backward of {WIDTH} x {WIDTH}, {TOKENS} tokens"
    rows = [Row(title, ours("step"), released("step"), ratio_at_most=0.5)]
    return case(f"structure/{method}", unit="CPU s", rows=rows)(start)


for _method in STRUCTURED:
    enter(_method)
