# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Train one method several times, and measure it."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import torch
from examples.method_comparison.methods import RATES, config_of, setup_of
from examples.small_model import Base, Texts, bits_per_byte, train

from peft import get_peft_model


SAMPLES = 16  # of a batch


@dataclass(frozen=True)
class Result:
    """
    What a method has reached.

    Attributes:
        method: its name.
        bits: bits per byte of the test text, the mean over the seeds; fewer are better.
        spread: their standard deviation.
        trained: numbers that were trained.
        milliseconds: per step.
        kilobytes: of the saved adapter.
        rate: learning rate that was chosen.
    """

    method: str
    bits: float
    spread: float
    trained: int
    milliseconds: float
    kilobytes: float
    rate: float


def run(method: str, base: Base, texts: Texts, steps: int, rate: float, seed: int, folder: Path) -> dict[str, float]:
    """Train one adapter from a seed, measure and save it."""
    torch.manual_seed(seed)
    model, extra = base.copy(), setup_of(method).inputs(SAMPLES)
    model = get_peft_model(model, config_of(method, model, folder))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    training = train(model, texts.train, steps, rate, seed, extra)
    target = folder / f"{method}-{rate}-{seed}"
    model.save_pretrained(target)
    return {
        "validation": bits_per_byte(model, texts.validation, extra),
        "test": bits_per_byte(model, texts.test, extra),
        "trained": trained,
        "seconds": training.seconds,
        "bytes": sum(file.stat().st_size for file in target.rglob("*.safetensors")),
    }


def compare(method: str, base: Base, texts: Texts, arguments: argparse.Namespace, folder: Path) -> Result:
    """Choose the rate with the first seed, and repeat it with the others."""
    tried = {
        rate: run(method, base, texts, arguments.steps, rate, 0, folder)
        for rate in (RATES[1:2] if arguments.quick else RATES)
    }
    rate = min(tried, key=lambda rate: tried[rate]["validation"])
    runs = [tried[rate]]
    runs += [run(method, base, texts, arguments.steps, rate, seed, folder) for seed in range(1, arguments.seeds)]
    bits = [found["test"] for found in runs]
    return Result(
        method=method,
        bits=mean(bits),
        spread=pstdev(bits),
        trained=int(runs[0]["trained"]),
        milliseconds=1000 * min(found["seconds"] for found in runs),
        kilobytes=runs[0]["bytes"] / 1024,
        rate=rate,
    )
