# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Computing with LoHa and LoKr: a layer's forward pass and training step."""

from collections.abc import Iterator

import torch
from case import Row, case, ours, released
from measuring import best_of
from torch import nn


WIDTH = 1024
METHODS = {"LoHa r=8": ("LoHaConfig", 8), "LoHa r=16": ("LoHaConfig", 16), "LoKr r=8": ("LoKrConfig", 8)}


def _rows(what: str) -> list[Row]:
    goals = {"LoHa r=8": 0.7, "LoHa r=16": 0.7, "LoKr r=8": 1.0}
    return [
        Row(f"{method} {what}", ours(method), released(method), ratio_at_most=goal) for method, goal in goals.items()
    ]


@case("lycoris/training", unit="CPU s", rounds=9, rows=_rows("forward and backward, 8 x 128 tokens"))
def training() -> Iterator[dict[str, float]]:
    """One Linear layer 1024 x 1024: a training step without the optimiser."""
    layers = _layers()
    x = torch.randn(8, 128, WIDTH, requires_grad=True)
    gradient = torch.randn(8, 128, WIDTH)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    while True:
        yield _times(layers, 4, step)


@case("lycoris/forward", unit="CPU s", rounds=9, rows=_rows("forward, 8 x 128 tokens"))
@torch.no_grad()
def forward() -> Iterator[dict[str, float]]:
    """The same layer without gradients, a batch of prompts."""
    layers, x = _layers(), torch.randn(8, 128, WIDTH)
    while True:
        yield _times(layers, 6, lambda layer: layer.eval()(x))


@case("lycoris/single-token", unit="CPU s", rounds=9, rows=_rows("forward of a single token"))
@torch.no_grad()
def single_token() -> Iterator[dict[str, float]]:
    """The same layer, decoding."""
    layers, x = _layers(), torch.randn(1, 1, WIDTH)
    while True:
        yield _times(layers, 10, lambda layer: layer.eval()(x), calls=10)


def _times(layers: dict[str, nn.Module], repetitions: int, step: object, calls: int = 1) -> dict[str, float]:
    """Time a step of each layer."""
    times = best_of(repetitions, *(lambda layer=layer: step(layer) for layer in layers.values()), calls=calls)
    return dict(zip(layers, times, strict=True))


def _layers() -> dict[str, nn.Module]:
    """Make one adapted Linear layer per method, with nothing in it that is zero."""
    import peft

    layers = {}
    for method, (config, r) in METHODS.items():
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        peft.get_peft_model(base, getattr(peft, config)(r=r, target_modules=["0"], init_weights=False))
        layers[method] = base[0]
    return layers
