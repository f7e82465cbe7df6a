# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Computing with LoRA: against the released package, and against what one would write by hand."""

from collections.abc import Iterator

import torch
from case import Row, case, ours, released
from measuring import best_of
from models import HandWrittenLora, make_effective
from torch import nn


WIDTH, RANK, ALPHA = 1024, 16, 32


@case(
    "forward/training",
    unit="CPU s",
    rounds=15,
    rows=[
        Row("LoRA forward and backward, 8 x 128 tokens", ours("lora"), released("lora"), ratio_at_most=1.0),
        Row(
            "the same, against a hand-written layer",
            ours("lora"),
            ours("by hand", "by hand"),
            ratio_at_most=1.03,
        ),
        Row("the same, released against a hand-written layer", released("lora"), released("by hand", "by hand")),
    ],
)
def training() -> Iterator[dict[str, float]]:
    """One Linear layer 1024 x 1024, r=16: a training step without the optimiser."""
    lora, by_hand = _layers()
    x = torch.randn(8, 128, WIDTH, requires_grad=True)
    gradient = torch.randn(8, 128, WIDTH)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    while True:
        times = best_of(8, lambda: step(lora), lambda: step(by_hand))
        yield dict(zip(("lora", "by hand"), times, strict=True))


@case(
    "forward/single-token",
    unit="CPU s",
    rounds=15,
    rows=[
        Row("LoRA forward of a single token", ours("lora"), released("lora"), ratio_at_most=1.0),
        Row("the same, against a hand-written layer", ours("lora"), ours("by hand", "by hand")),
        Row("the same, released against a hand-written layer", released("lora"), released("by hand", "by hand")),
    ],
)
@torch.no_grad()
def single_token() -> Iterator[dict[str, float]]:
    """The same layer, decoding."""
    lora, by_hand = (layer.eval() for layer in _layers())
    x = torch.randn(1, 1, WIDTH)
    while True:
        times = best_of(20, lambda: lora(x), lambda: by_hand(x), calls=50)
        yield dict(zip(("lora", "by hand"), times, strict=True))


def _layers() -> tuple[nn.Module, nn.Module]:
    """Make the package's layer and the hand-written one, both around the same Linear layer."""
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(WIDTH, WIDTH)
    base = nn.Sequential(linear)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
    make_effective(model)
    return base[0], HandWrittenLora(linear, RANK, ALPHA)
