# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The texts, and the small language model that has read the first of them."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).parents[1]
NOVEL = ROOT / "examples" / "tied_embeddings" / "data" / "pride_and_prejudice.txt"
LENGTH = 64  # bytes that are read at once


@dataclass(frozen=True)
class Texts:
    """
    Bytes, as the model's tokens.

    Attributes:
        novel: what the base model is trained on.
        train: Python code, which adapters are trained on.
        validation: other code, by which the learning rate is chosen.
        test: other code again, on which the quality is measured.
    """

    novel: torch.Tensor
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def read_texts() -> Texts:
    """Read the novel, and the code of this repository: three rooms of the package."""

    def tokens(text: bytes) -> torch.Tensor:
        return torch.tensor(list(text), dtype=torch.long)

    def code(room: str) -> torch.Tensor:
        files = sorted((ROOT / "src" / "peft" / room).glob("*.py"))
        return tokens(b"\n".join(file.read_bytes() for file in files))

    return Texts(tokens(NOVEL.read_bytes()), code("layers"), code("surgery"), code("anatomy"))


def build_model() -> LlamaForCausalLM:
    """Make a Llama of four layers with tied embeddings, and with biases, which some methods train."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batch(text: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw pieces of a text, (size, LENGTH)."""
    starts = torch.randint(len(text) - LENGTH, (size, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


class Training(NamedTuple):
    """
    What a training was like.

    Attributes:
        seconds: per step, the median.
        losses: of each step.
    """

    seconds: float
    losses: list[float]


def adamw(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Make the optimiser that is used where nothing else is said."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def train(
    model: torch.nn.Module,
    text: torch.Tensor,
    steps: int,
    rate: float,
    seed: int,
    extra: dict[str, torch.Tensor] | None = None,
    optimizer_of: Callable[[torch.nn.Module, float], torch.optim.Optimizer] = adamw,
) -> Training:
    """
    Train what is trainable in a model.

    Args:
        model: a language model.
        text: what it reads.
        steps: how many batches of 16 pieces.
        rate: learning rate at the start; it falls to zero.
        seed: of the pieces.
        extra: further arguments of the model.
        optimizer_of: makes an optimiser from the model and the rate.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    times, losses = [], []
    model.train()
    for _ in range(steps):
        ids = batch(text, 16, generator)
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, **(extra or {})).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(time.perf_counter() - started)
        losses.append(loss.item())
    return Training(sorted(times)[len(times) // 2], losses)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: torch.Tensor, extra: dict[str, torch.Tensor] | None = None) -> float:
    """Measure how badly a model foretells pieces of a text that are always the same, in bits per byte."""
    model.eval()
    generator = torch.Generator().manual_seed(1234)
    losses = []
    for _ in range(8):
        ids = batch(text, 16, generator)
        # from the logits: some methods add a penalty to the loss, and some put virtual tokens in front
        logits = model(input_ids=ids, **(extra or {})).logits[:, -LENGTH:]
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
    return sum(losses) / len(losses) / math.log(2)


class Base:
    """
    The trained base model, of which each method gets a copy.

    Args:
        texts: the texts.
        steps: how many batches of the novel it reads.
    """

    def __init__(self, texts: Texts, steps: int) -> None:
        self._model = build_model()
        train(self._model, texts.novel, steps, rate=3e-3, seed=0)
        self._model.eval()

    def copy(self) -> LlamaForCausalLM:
        """Give a model of one's own."""
        return copy.deepcopy(self._model)
