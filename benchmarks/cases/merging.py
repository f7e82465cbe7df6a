# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merging adapters into the base weights."""

from collections.abc import Iterator

from case import Row, case, ours, released
from measuring import MemoryMeter, cpu_seconds
from models import make_effective, many_linears
from torch import nn


SIZES = ((48, 1024), (4, 4096))


@case(
    "merging/time",
    unit="CPU s",
    rounds=5,
    fresh_process=True,
    rows=[
        Row(
            f"merge_and_unload, {layers} layers {width} x {width}, r=16",
            ours(str(width)),
            released(str(width)),
            ratio_at_most=1 / 4,
        )
        for layers, width in SIZES
    ],
)
def time() -> Iterator[dict[str, float]]:
    """Weights that a cache holds, and weights that it does not; once per process, as programs do it."""
    _adapted(many_linears(2)).merge_and_unload()  # imports
    models = {str(width): _adapted(many_linears(layers, width)) for layers, width in SIZES}
    yield {width: cpu_seconds(model.merge_and_unload) for width, model in models.items()}


@case(
    "merging/memory",
    unit="weights",
    rounds=2,
    fresh_process=True,
    rows=[
        Row(
            "merge_and_unload, 4 layers 4096 x 4096: peak extra memory",
            ours("peak"),
            released("peak"),
            value_at_most=0.1,
        ),
    ],
)
def memory() -> Iterator[dict[str, float]]:
    """What merging needs beside the model, in units of one weight."""
    _adapted(many_linears(2, 1024)).merge_and_unload()  # imports, caches
    width = 4096
    model = _adapted(many_linears(4, width))
    meter = MemoryMeter()
    model.merge_and_unload()
    yield {"peak": meter.peak() / (width * width * 4)}


def _adapted(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=16, target_modules=["query", "value"]))
    make_effective(model)
    return model
