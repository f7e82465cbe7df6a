# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods that rotate the inputs of a layer: OFT, BOFT and HRA, against the released package."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Row, case, ours, released
from measuring import best_of
from torch import nn


WIDTH, BATCH = 1024, (8, 64)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "OFT, blocks of 32": ("OFTConfig", {"oft_block_size": 32}),
    "OFT, blocks of 32, exact": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "BOFT, blocks of 4": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA, 8 reflections": ("HRAConfig", {"r": 8}),
    "HRA, 8 reflections, orthogonal": ("HRAConfig", {"r": 8, "apply_GS": True}),
}


def _rows(what: str) -> list[Row]:
    return [Row(f"{name}: {what}", ours(name), released(name), ratio_at_most=1.0) for name in SETTINGS]


@case("orthogonal/training", unit="CPU s", rounds=7, rows=_rows("forward and backward, 8 x 64 tokens"))
def training() -> Iterator[dict[str, float]]:
    """One Linear layer 1024 x 1024: a training step without the optimiser."""
    x = torch.randn(*BATCH, WIDTH, requires_grad=True)
    gradient = torch.randn(*BATCH, WIDTH)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    yield from _times({name: (lambda layer=layer: step(layer)) for name, layer in _layers().items()})


@case("orthogonal/single-token", unit="CPU s", rounds=7, rows=_rows("forward of a single token"))
@torch.no_grad()
def single_token() -> Iterator[dict[str, float]]:
    """The same layer, decoding."""
    x = torch.randn(1, 1, WIDTH)
    layers = {name: layer.eval() for name, layer in _layers().items()}
    yield from _times({name: (lambda layer=layer: layer(x)) for name, layer in layers.items()})


@case("orthogonal/merging", unit="CPU s", rounds=7, rows=_rows("merge and unmerge"))
def merging() -> Iterator[dict[str, float]]:
    """The same layer, merged and unmerged."""

    def there_and_back(layer: nn.Module) -> None:
        layer.merge()
        layer.unmerge()

    yield from _times({name: (lambda layer=layer: there_and_back(layer)) for name, layer in _layers().items()})


def _times(actions: dict[str, Callable[[], None]]) -> Iterator[dict[str, float]]:
    while True:
        yield dict(zip(actions, best_of(4, *actions.values()), strict=True))


def _layers() -> dict[str, nn.Module]:
    """Make a layer per setting, each with an adapter that has been trained a little."""
    import peft

    layers = {}
    for name, (config_class, settings) in SETTINGS.items():
        config = getattr(peft, config_class)(target_modules=["0"], **settings)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        layers[name] = model.base_model.model[0]
    return layers
