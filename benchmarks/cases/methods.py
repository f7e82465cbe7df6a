# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Every registered method: a training step, a token, putting it in and merging it, and what it holds and writes."""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from case import Row, case, ours, released
from measuring import TensorMeter, best_of
from methods import SAMPLES, TOKENS, config_of, language_model, methods, setup_of
from torch import nn

from peft import get_peft_model


SECONDS = {"step": "training step", "token": "single token", "inject": "injection", "merge": "merge"}
REPEATED = 4


class Steps:
    """
    Training steps and single tokens of a language model with an adapter.

    Args:
        model: the model.
        method: name of the method, which may need further inputs.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model = model
        self._ids = torch.randint(512, (SAMPLES, TOKENS))
        self._inputs = setup_of(method).inputs
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> None:
        """Forward, backward, optimiser."""
        loss = self._model(input_ids=self._ids, labels=self._ids, **self._inputs(SAMPLES)).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def token(self) -> None:
        """Forward of one token."""
        self._model(input_ids=self._ids[:1, :1], **self._inputs(1))

    def seconds(self) -> dict[str, float]:
        """Time both."""
        (step,) = best_of(4, self._model.train() and self.step)
        (token,) = best_of(25, self._model.eval() and self.token, calls=4)
        return {"step": step, "token": token}

    def peak(self) -> int:
        """Give the most bytes that a step needs beside the model and the state of the optimiser."""
        self._model.train()
        self.step()
        with TensorMeter() as meter:
            self.step()
        return meter.peak


def is_mergeable(model: nn.Module) -> bool:
    """Say whether a package can merge the adapter of a model, which is merged by that."""
    try:
        model.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def putting_in_and_merging(base: nn.Module, config: Any, merges: bool) -> dict[str, float]:
    """Time injection and merging, the least of four: each needs a model of its own."""
    fresh = [(copy.deepcopy(base), copy.deepcopy(config)) for _ in range(REPEATED)]
    models: list[nn.Module] = []
    gc.collect()  # once, and what is timed follows at once: the caches of the processor are not those of a collection
    times = {"inject": least(lambda: models.append(get_peft_model(*fresh.pop())))}
    if merges:
        times["merge"] = least(lambda: models.pop().merge_and_unload())
    return times


def least(action: Callable[[], Any]) -> float:
    """Time something that cannot be repeated on the same model."""
    return best_of(REPEATED, action)[0]


def bytes_on_disk(model: nn.Module, folder: Path) -> int:
    """Save an adapter, and count the bytes of its tensors' files."""
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def measure(method: str) -> Iterator[dict[str, float]]:
    """One method on a small Llama, all of whose linear layers it adapts if it adapts such."""
    base = language_model()
    with TemporaryDirectory() as folder:
        config = config_of(method, copy.deepcopy(base), Path(folder))

        def adapted() -> nn.Module:
            return get_peft_model(copy.deepcopy(base), copy.deepcopy(config))

        model = adapted()
        steps, merges = Steps(model, method), is_mergeable(adapted())
        sizes = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "peak": steps.peak() / 1024,
            "disk": bytes_on_disk(model, Path(folder, "saved")) / 1024,
        }
        while True:
            yield {**steps.seconds(), **putting_in_and_merging(base, config, merges), **sizes}


def rows(method: str) -> list[Row]:
    """The lines of the report for a method."""
    times = [Row(f"{method}: {what}", ours(name), released(name), ratio_at_most=1.0) for name, what in SECONDS.items()]
    return [
        *times,
        Row(f"{method}: peak memory of a step", ours("peak"), released("peak"), ratio_at_most=1.0, unit="KiB"),
        Row(f"{method}: on disk", ours("disk"), released("disk"), unit="KiB"),
        Row(f"{method}: trained parameters", ours("trained"), released("trained"), unit="numbers"),
    ]


def enter(method: str) -> Callable[[], Iterator[dict[str, float]]]:
    """Enter the case of a method."""
    start = partial(measure, method)
    start.__doc__ = measure.__doc__
    return case(f"methods/{method}", unit="CPU s", rounds=5, rows=rows(method))(start)


for _method in methods():
    enter(_method)
