# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Combining adapters into a new one."""

from collections.abc import Iterator

from case import Row, case, ours, released
from measuring import best_of
from models import many_linears
from torch import nn


WIDTH = 1024
COUNTS = (2, 4)
KINDS = {"svd": {}, "cat": {}, "linear": {}, "ties": {"density": 0.5}}


@case(
    "combination/svd",
    unit="CPU s",
    rounds=3,
    rows=[
        Row(
            f"add_weighted_adapter 'svd', {count} adapters r=16, 2 layers {WIDTH} x {WIDTH}",
            ours(f"svd {count}"),
            released(f"svd {count}"),
            ratio_at_most=1 / 30,
        )
        for count in COUNTS
    ],
)
def svd() -> Iterator[dict[str, float]]:
    """The best approximation of a weighted sum of adapters."""
    yield from _combining(["svd"], COUNTS)


@case(
    "combination/others",
    unit="CPU s",
    rounds=3,
    rows=[
        Row(
            f"add_weighted_adapter {kind!r}, 4 adapters r=16, 2 layers {WIDTH} x {WIDTH}",
            ours(f"{kind} 4"),
            released(f"{kind} 4"),
            ratio_at_most=1.0,
        )
        for kind in KINDS
        if kind != "svd"
    ],
)
def others() -> Iterator[dict[str, float]]:
    """The kinds that put factors together or combine them entry by entry."""
    yield from _combining([kind for kind in KINDS if kind != "svd"], [4])


def _combining(kinds: list[str], counts: list[int] | tuple[int, ...]) -> Iterator[dict[str, float]]:
    model = _adapted(many_linears(2, WIDTH), max(counts))
    while True:
        figures = {}
        for kind in kinds:
            for count in counts:
                (figures[f"{kind} {count}"],) = best_of(2, lambda k=kind, c=count: _combine(model, k, c))
        yield figures


def _combine(model: nn.Module, kind: str, count: int) -> None:
    names = [f"adapter{number}" for number in range(count)]
    model.add_weighted_adapter(names, [1 / count] * count, "new", combination_type=kind, **KINDS[kind])
    model.delete_adapter("new")


def _adapted(base: nn.Module, count: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="adapter0")
    for number in range(1, count):
        model.add_adapter(f"adapter{number}", config)
    return model
