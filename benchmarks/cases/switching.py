# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Choosing among many adapters, and doing without them for a moment."""

from collections.abc import Callable, Iterator
from typing import Any

from case import Row, case, ours, released
from measuring import best_of, cpu_seconds
from models import many_linears


ADAPTERS = 50


@case(
    "switching",
    unit="CPU s",
    rounds=5,
    rows=[
        Row(
            "set_adapter, 50 adapters on 256 layers",
            ours("set_adapter"),
            released("set_adapter"),
            ratio_at_most=1 / 20,
        ),
        Row("entering disable_adapter, 50 x 256", ours("enter"), released("enter"), ratio_at_most=1 / 20),
        Row("leaving disable_adapter, 50 x 256", ours("leave"), released("leave"), ratio_at_most=1 / 20),
    ],
)
def switching() -> Iterator[dict[str, float]]:
    """`set_adapter` and `disable_adapter` on a model that holds many adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(many_linears(256), config)
    for number in range(1, ADAPTERS):
        model.add_adapter(f"adapter{number}", config)
    while True:
        (there_and_back,) = best_of(5, lambda: (model.set_adapter("adapter7"), model.set_adapter("adapter31")))
        times = [_enter_and_leave(model.disable_adapter) for _ in range(5)]
        yield {
            "set_adapter": there_and_back / 2,
            "enter": min(enter for enter, _ in times),
            "leave": min(leave for _, leave in times),
        }


def _enter_and_leave(make_context: Callable[[], Any]) -> tuple[float, float]:
    context = make_context()
    return cpu_seconds(context.__enter__), cpu_seconds(lambda: context.__exit__(None, None, None))
