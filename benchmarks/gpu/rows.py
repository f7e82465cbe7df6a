# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rows of the table: what is measured, and what is to be reached."""

from dataclasses import dataclass, field
from typing import Any


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """
    A row.

    Attributes:
        kind: what is measured: "step" of training, "token" of generation, "prefill" or "lifecycle".
        batch: sequences.
        length: tokens of each; those of the prompt for tokens.
        config: fields of the config, beside rank 16 on all linear layers.
        method: which config.
        adapters: how many, each for some sequences of the batch.
        autocast: whether steps run under autocast.
        narrow: whether adapters are in the base model's type instead of float32.
        checkpointing: whether activations are computed again.
        layers: of the model; None for all.
        goal_ms: what is to be reached on an H100 with the shape "1b", in milliseconds.
        goal_ratio: the same as a multiple of the base model's time.
        goal_gb: the same for peak memory beyond what is held.
    """

    kind: str
    batch: int = 8
    length: int = 1024
    config: dict[str, Any] = field(default_factory=dict)
    method: str = "LoraConfig"
    adapters: int = 1
    autocast: bool = True
    narrow: bool = False
    checkpointing: bool = False
    layers: int | None = None
    goal_ms: float | None = None
    goal_ratio: float | None = None
    goal_gb: float | None = None

    @property
    def is_lora(self) -> bool:
        """Whether a layer written by hand can stand beside it."""
        return self.method == "LoraConfig" and self.adapters == 1 and not self.config


ROWS: dict[str, Row] = {
    "step, autocast, float32 adapters": Row("step", goal_ms=128, goal_gb=13.5),
    "step, bfloat16 adapters": Row("step", autocast=False, narrow=True, goal_ms=126),
    "step, float32 adapters, no autocast": Row("step", autocast=False, goal_ms=165, goal_gb=15),
    "step, dropout 0.05": Row("step", config={"lora_dropout": 0.05}, goal_ms=145, goal_gb=14),
    "step, gradient checkpointing": Row("step", checkpointing=True, goal_ms=185),
    "step, 512 tokens": Row("step", batch=1, length=512, goal_ms=85),
    "step, DoRA": Row("step", config={"use_dora": True}, goal_ms=175, goal_gb=16),
    "token, batch 1": Row("token", batch=1, length=64, goal_ratio=1.25),
    "token, batch 16": Row("token", batch=16, length=64),
    "token, 16 adapters in a batch of 16": Row("token", batch=16, length=64, adapters=16, goal_ratio=1.4),
    "prefill 8 x 512": Row("prefill", batch=8, length=512, goal_ms=42),
    "prefill 8 x 512, 8 adapters": Row("prefill", batch=8, length=512, adapters=8, goal_ms=55),
    "single token, IA3, 4 layers": Row("prefill", batch=1, length=1, method="IA3Config", layers=4),
    "single token, LoHa, 4 layers": Row("prefill", batch=1, length=1, method="LoHaConfig", layers=4),
    "step, VeRA, 4 layers": Row("step", batch=4, length=512, method="VeraConfig", config={"r": 256}, layers=4),
    "save, load, switch": Row("lifecycle", config={"r": 64}),
}
