# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods whose deltas have a structure, on a wide layer, where that is what counts."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from case import Row, case, ours, released
from measuring import TensorMeter, best_of
from torch import nn

from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


WIDTH, TOKENS = 2048, 256
# method -> goal: half the release's time where that builds the delta and it can be done without
GOALS = {"C3A": 1.0, "DELORA": 1.0, "FOURIERFT": 0.5, "GRALORA": 1.0, "HIRA": 0.5, "RANDLORA": 1.0, "WAVEFT": 0.5}


def measure(method: str) -> Iterator[dict[str, float]]:
    """One Linear layer 2048 x 2048: forward and backward, also for the layer before it."""
    bare = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0"]))
    x, gradient = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)

    def step(layer: nn.Module) -> None:
        base.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    step(base)
    with TensorMeter() as meter:
        step(base)
    while True:
        times = best_of(2, lambda: step(base), lambda: step(bare))
        yield {"step": times[0], "bare": times[1], "peak": meter.peak / 2**20}


def enter(method: str) -> Callable[[], Iterator[dict[str, float]]]:
    """Enter the case of a method."""
    start = partial(measure, method)
    start.__doc__ = measure.__doc__
    title = f"{method}: forward and backward of {WIDTH} x {WIDTH}, {TOKENS} tokens"
    rows = [
        Row(title, ours("step"), released("step"), ratio_at_most=GOALS[method]),
        Row(f"{method}: the bare layer", ours("bare"), released("bare")),
        Row(f"{method}: peak memory of that", ours("peak"), released("peak"), ratio_at_most=1.0, unit="MiB"),
    ]
    return case(f"structure/{method}", unit="CPU s", rows=rows)(start)


for _method in GOALS:
    enter(_method)
