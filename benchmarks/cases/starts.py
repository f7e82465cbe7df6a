# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Starts of LoRA that learn from data, against the released package: time and memory of preparing and making them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Row, case, ours, released
from measuring import MemoryMeter, cpu_seconds
from torch import nn


LAYERS, WIDTH, RANK = 24, 1024, 8
TARGETS = ["q", "k", "v", "o"]


class Block(nn.Module):
    """Three projections of one input, and one of what they make: as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (samples, tokens, width) to the same."""
        normed = nn.functional.rms_norm(x, (WIDTH,))
        return x + self.o(torch.tanh(self.q(normed)) * self.k(normed) + self.v(normed))


def _model() -> tuple[nn.Module, list[torch.Tensor]]:
    """Make a model, and batches whose rows vary more along some directions than along others, as texts do."""
    torch.manual_seed(0)
    spectrum = torch.arange(1, WIDTH + 1) ** -1.0
    return nn.Sequential(*(Block() for _ in range(LAYERS))), [torch.randn(1, 256, WIDTH) * spectrum for _ in range(4)]


def _measured(action: Callable[[], Any]) -> dict[str, float]:
    memory = MemoryMeter()
    seconds = cpu_seconds(action)
    return {"time": seconds, "memory": memory.peak() / (LAYERS * 4 * WIDTH**2 * 4)}


def _rows(title: str) -> list[Row]:
    return [
        Row(f"{title}: time", ours("time"), released("time"), ratio_at_most=0.5, unit="CPU s"),
        Row(f"{title}: memory beside the model", ours("memory"), released("memory"), ratio_at_most=0.5, unit="models"),
    ]


@case("starts/eva", unit="", rounds=3, fresh_process=True, rows=_rows("EVA, 24 layers"))
def eva() -> Iterator[dict[str, float]]:
    """Ranks shared out over 96 layers."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    model, batches = _model()
    config = LoraConfig(
        r=RANK, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.5)
    )

    def start() -> None:
        initialize_lora_eva_weights(
            get_peft_model(model, config, low_cpu_mem_usage=True),
            batches,
            forward_fn=lambda model, batch: model(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda inputs, _, __: inputs[0].flatten(0, 1),
            show_progress_bar=False,
        )

    yield _measured(start)


@case("starts/corda", unit="", rounds=3, fresh_process=True, rows=_rows("CorDA, 24 layers"))
def corda() -> Iterator[dict[str, float]]:
    """Covariances of the inputs of 96 layers, and as many decompositions."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, batches = _model()
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig())

    def start() -> None:
        preprocess_corda(model, config, run_model=lambda: [model(batch) for batch in batches])
        get_peft_model(model, config)

    yield _measured(start)


@case("starts/lora_ga", unit="", rounds=3, fresh_process=True, rows=_rows("LoRA-GA, 24 layers"))
def lora_ga() -> Iterator[dict[str, float]]:
    """Gradients of 96 layers, and as many decompositions."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

    model, batches = _model()
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def start() -> None:
        preprocess_loraga(model, config, lambda: [model(batch).square().mean().backward() for batch in batches[:2]])
        get_peft_model(model, config)

    yield _measured(start)
