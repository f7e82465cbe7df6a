# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DoRA against the released package: its norm of each weight row is what costs, beside LoRA's own work."""

from collections.abc import Iterator

import torch
from case import Row, case, ours, released
from measuring import best_of
from models import make_effective
from torch import nn


WIDTH, RANK, ALPHA = 1024, 16, 32


@case(
    "dora/training",
    unit="CPU s",
    rounds=15,
    rows=[
        Row("DoRA forward and backward, 128 tokens", ours("128"), released("128"), ratio_at_most=0.75),
        Row("the same, 8 x 128 tokens", ours("1024"), released("1024")),
        Row("the same, 8 x 128 tokens, with dropout", ours("dropout"), released("dropout")),
    ],
)
def training() -> Iterator[dict[str, float]]:
    """One Linear layer 1024 x 1024, r=16: a training step without the optimiser."""
    plain, dropping = _layer(), _layer(lora_dropout=0.1)

    def step(layer: nn.Module, x: torch.Tensor) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(torch.ones_like(x))

    short = torch.randn(1, 128, WIDTH, requires_grad=True)
    long = torch.randn(8, 128, WIDTH, requires_grad=True)
    while True:
        times = best_of(6, lambda: step(plain, short), lambda: step(plain, long), lambda: step(dropping, long))
        yield dict(zip(("128", "1024", "dropout"), times, strict=True))


@case(
    "dora/single-token",
    unit="CPU s",
    rounds=15,
    rows=[Row("DoRA forward of a single token", ours("dora"), released("dora"), ratio_at_most=0.4)],
)
@torch.no_grad()
def single_token() -> Iterator[dict[str, float]]:
    """The same layer, decoding, with its norms kept, which both packages can be asked for."""
    from peft.helpers import DoraCaching

    layer = _layer().eval()
    x = torch.randn(1, 1, WIDTH)
    while True:
        with DoraCaching():
            times = best_of(10, lambda: layer(x), calls=20)
        yield {"dora": times[0]}


def _layer(**options: float) -> nn.Module:
    """Make a layer with DoRA."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True, **options)
    make_effective(get_peft_model(base, config))
    return base[0]
