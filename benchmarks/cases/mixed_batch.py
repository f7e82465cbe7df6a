# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A batch in which every sample has an adapter of its own."""

from collections.abc import Iterator

import torch
from case import Row, case, ours, released
from measuring import best_of
from models import make_effective, many_linears


BATCH = 16
LAYERS, WIDTH = 16, 1024


@case(
    "mixed batch",
    unit="CPU s",
    rounds=5,
    rows=[
        Row(
            f"{BATCH} adapters in a batch of {BATCH} single tokens, against one adapter for all",
            ours("mixed"),
            ours("single"),
            ratio_at_most=1.6,
        ),
        Row(f"{BATCH} adapters in a batch of {BATCH} single tokens", ours("mixed"), released("mixed"), 1.0),
        Row("one adapter for the batch", ours("single"), released("single"), 1.0),
    ],
)
def mixed() -> Iterator[dict[str, float]]:
    """`adapter_names` when text is generated: one token per sample."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["query", "value"])
    model = get_peft_model(many_linears(LAYERS, WIDTH), config, adapter_name="adapter0")
    for number in range(1, BATCH):
        model.add_adapter(f"adapter{number}", config)
    make_effective(model)
    model.eval()
    x = torch.randn(BATCH, 1, WIDTH)
    names = [f"adapter{number}" for number in range(BATCH)]
    with torch.no_grad():
        while True:
            mixed_time, single_time = best_of(5, lambda: model(x, adapter_names=names), lambda: model(x), calls=3)
            yield {"mixed": mixed_time, "single": single_time}
