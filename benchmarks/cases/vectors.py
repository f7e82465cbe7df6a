# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Computing with methods that train vectors only: IA3 and VeRA."""

from collections.abc import Iterator

import torch
from case import Row, case, ours, released
from measuring import best_of
from torch import nn


WIDTH = 1024
KINDS = {
    "IA3, outputs": "IA3 on outputs",
    "IA3, inputs": "IA3 on inputs",
    "VeRA": "VeRA, r=256",
}


@case(
    "vectors/training",
    unit="CPU s",
    rounds=15,
    rows=[
        Row(f"{title}: forward and backward, 8 x 64 tokens", ours(kind), released(kind), ratio_at_most=1.0)
        for kind, title in KINDS.items()
    ],
)
def training() -> Iterator[dict[str, float]]:
    """One Linear layer 1024 x 1024: a training step without the optimiser."""
    layers = _layers()
    x = torch.randn(8, 64, WIDTH, requires_grad=True)
    gradient = torch.randn(8, 64, WIDTH)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    while True:
        times = best_of(8, *(lambda layer=layer: step(layer) for layer in layers))
        yield dict(zip(KINDS, times, strict=True))


@case(
    "vectors/single-token",
    unit="CPU s",
    rounds=15,
    rows=[
        Row(f"{title}: forward of a single token", ours(kind), released(kind), ratio_at_most=1.0)
        for kind, title in KINDS.items()
    ],
)
@torch.no_grad()
def single_token() -> Iterator[dict[str, float]]:
    """The same layers, decoding."""
    layers = [layer.eval() for layer in _layers()]
    x = torch.randn(1, 1, WIDTH)
    while True:
        times = best_of(20, *(lambda layer=layer: layer(x) for layer in layers), calls=50)
        yield dict(zip(KINDS, times, strict=True))


def _layers() -> list[nn.Module]:
    """Make one adapted layer of each kind, each around a Linear layer of its own."""
    from peft import IA3Config, VeraConfig, get_peft_model

    configs = [
        IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
        IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False),
        VeraConfig(r=256, target_modules=["0"], init_weights=False),
    ]
    bases = [nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in configs]
    for base, config in zip(bases, configs, strict=True):
        get_peft_model(base, config)
    return [base[0] for base in bases]
