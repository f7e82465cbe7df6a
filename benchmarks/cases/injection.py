# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Putting adapters into models of many layers: what the bookkeeping costs, the layers being tiny."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from case import OURS, Row, case, ours, released
from measuring import cpu_seconds
from models import many_linears, names_of_linears


LAYERS = 10_000


@case(
    "injection/suffix",
    unit="CPU s",
    rounds=3,
    rows=[Row("LoRA into 10,000 Linear layers, by suffix", ours("inject"), released("inject"), ratio_at_most=1 / 5)],
)
def by_suffix() -> Iterator[dict[str, float]]:
    """Targets named by the last part of their names."""
    _inject(many_linears(100), ["query", "value"])  # imports, caches
    while True:
        yield {"inject": _inject(many_linears(LAYERS), ["query", "value"])}


@case(
    "injection/full-names",
    unit="CPU s",
    rounds=3,
    rows=[
        Row("LoRA into 10,000 Linear layers, by full names", ours("inject"), released("inject"), ratio_at_most=1 / 5)
    ],
)
def by_full_names() -> Iterator[dict[str, float]]:
    """Targets named one by one."""
    names = names_of_linears(many_linears(LAYERS))
    _inject(many_linears(100), names_of_linears(many_linears(100)))
    while True:
        yield {"inject": _inject(many_linears(LAYERS), names)}


@case(
    "injection/linearity",
    unit="CPU s",
    rounds=3,
    packages=[OURS],
    rows=[
        Row(
            f"injection by {kind}, 10,000 layers against 2,500 (linear: 4)",
            ours(f"{kind} 10000", "10,000"),
            ours(f"{kind} 2500", "2,500"),
            ratio_at_most=4.8,
        )
        for kind in ("suffix", "full names")
    ]
    + [
        Row(
            f"injection by {kind}, 5,000 layers against 2,500 (linear: 2)",
            ours(f"{kind} 5000", "5,000"),
            ours(f"{kind} 2500", "2,500"),
            ratio_at_most=2.4,
        )
        for kind in ("suffix", "full names")
    ],
)
def linearity() -> Iterator[dict[str, float]]:
    """Whether twice as many layers take twice as long."""
    _inject(many_linears(100), ["query", "value"])
    while True:
        figures = {}
        for layers in (2_500, 5_000, 10_000):
            base = many_linears(layers)
            figures[f"suffix {layers}"] = _inject(base, ["query", "value"])
            base = many_linears(layers)
            figures[f"full names {layers}"] = _inject(base, names_of_linears(base))
        yield figures


@case(
    "injection/tenth-adapter",
    unit="CPU s",
    rounds=3,
    rows=[
        Row(
            "10th adapter against the 1st, 500 layers",
            ours("tenth", "10th"),
            ours("first", "1st"),
            ratio_at_most=1.2,
        ),
        Row("10th adapter, 500 layers", ours("tenth"), released("tenth"), ratio_at_most=1 / 5),
    ],
)
def tenth_adapter() -> Iterator[dict[str, float]]:
    """Whether an adapter costs more where there are others."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query", "value"])
    _inject(many_linears(100), ["query", "value"])
    while True:
        base, models = many_linears(500), []
        first = cpu_seconds(lambda base=base, models=models: models.append(get_peft_model(base, config)))
        (model,) = models
        for number in range(2, 10):
            model.add_adapter(f"adapter{number}", config)
        yield {"first": first, "tenth": cpu_seconds(partial(model.add_adapter, "adapter10", config))}


@case(
    "import",
    unit="CPU s",
    rounds=3,
    rows=[
        Row("import peft", ours("import"), released("import")),
        Row("from peft import get_peft_model", ours("model"), released("model")),
    ],
)
def imports() -> Iterator[dict[str, float]]:
    """What a program pays before it starts."""
    statements = {"import": "import peft", "model": "from peft import get_peft_model"}
    while True:
        yield {name: _seconds_in_new_process(statement) for name, statement in statements.items()}


def _inject(base: object, targets: list[str]) -> float:
    from peft import LoraConfig, get_peft_model

    return cpu_seconds(lambda: get_peft_model(base, LoraConfig(r=2, target_modules=targets)))


def _seconds_in_new_process(statement: str) -> float:
    program = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
