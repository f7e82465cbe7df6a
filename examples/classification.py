# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the two examples of classification share: a base model, three ways to train it, a table and a plot."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from examples.tables import table
from examples.tied_embeddings.base_models import build_tiny, unpack_smollm2
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from peft import LoraConfig, get_peft_model


matplotlib.use("Agg")  # a file is all we want, so no display is needed

HEAD, LORA, FULL = "head only", "LoRA and head", "all weights"
# the head starts anew and takes large steps; what has been trained before takes small ones
RATE_OF_HEAD = 3e-3
RATE_OF_REST = {HEAD: 0.0, LORA: 1e-3, FULL: 5e-5}


@dataclass
class Task:
    """
    What one example is about.

    Args:
        name: folder below `outputs/`.
        task_type: for the config of the adapter.
        model_class: class of transformers that puts a head on the base model.
        adapter_class: class of this package that opens an adapter together with its base model.
        labels: names of the classes.
        read: gives the samples to train on and those that are held out; a sample has `input_ids` and `labels`.
        score: how good predictions are, from 0 to 1; takes a prediction per sample and the samples.
        score_name: what that number is called.
    """

    name: str
    task_type: str
    model_class: type
    adapter_class: type
    labels: list[str]
    read: Callable
    score: Callable
    score_name: str


@dataclass
class Result:
    """One way to train, and what came of it."""

    name: str
    trained: int
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)


def parse_args(task: Task, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m examples.{task.name}")
    parser.add_argument("--quick", action="store_true", help="a tiny random base model and a few samples: seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs") / task.name, help="folder for what is saved")
    parser.add_argument("--layers", type=int, default=2, help="how many layers of SmolLM2 the base model keeps")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def save_base(folder: Path, args: argparse.Namespace) -> None:
    """Save the lower layers of SmolLM2 as a model of their own, or the tiny model."""
    model, tokenizer = build_tiny() if args.quick else unpack_smollm2()
    model.model.layers = model.model.layers[: args.layers]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_model(task: Task, folder: Path, seed: int) -> nn.Module:
    """The base model with a fresh head, which is the same each time."""
    set_seed(seed)
    return task.model_class.from_pretrained(folder, num_labels=len(task.labels)).float()


def prepare(name: str, task: Task, model: nn.Module) -> nn.Module:
    """Choose what is trained: the head, the head and an adapter, or everything."""
    if name == HEAD:
        model.base_model.requires_grad_(False)
    if name == LORA:  # the head is trained and saved too, which follows from the type of the task
        config = LoraConfig(task_type=task.task_type, r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, config)
    return model


def batches(samples: list[dict], size: int, pad: int) -> list[dict[str, torch.Tensor]]:
    """The samples in batches, with the shorter ones filled up on the right."""
    made = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        longest = max(len(sample["input_ids"]) for sample in part)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in part])
        labels = [sample["labels"] for sample in part]
        if isinstance(labels[0], list):
            labels = [label + [-100] * (longest - len(label)) for label in labels]
        ids = [sample["input_ids"] + [pad] * (longest - len(sample["input_ids"])) for sample in part]
        mask = torch.arange(longest) < lengths[:, None]
        made.append({"input_ids": torch.tensor(ids), "attention_mask": mask.long(), "labels": torch.tensor(labels)})
    return made


@torch.no_grad()
def predict(model: nn.Module, samples: list[dict], args: argparse.Namespace) -> list[torch.Tensor]:
    """Logits of each sample: (classes,), or (length, classes) where each token has one."""
    model.eval()
    logits = []
    for batch in batches(samples, args.batch_size, model.config.pad_token_id):
        out = model(**batch).logits
        lengths = batch["attention_mask"].sum(dim=1)
        logits += [row if row.dim() == 1 else row[:length] for row, length in zip(out, lengths, strict=True)]
    return logits


def train(result: Result, task: Task, model: nn.Module, data: tuple, args: argparse.Namespace) -> None:
    """Train in epochs, and score the held-out samples after each."""
    train_samples, held_out = data
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if "score" in name]
    rest = [parameter for name, parameter in trained if "score" not in name]
    rates = [{"params": head, "lr": RATE_OF_HEAD}, {"params": rest, "lr": RATE_OF_REST[result.name]}]
    optimizer = torch.optim.AdamW(rates)
    shuffled = torch.Generator().manual_seed(args.seed)
    for epoch in range(args.epochs):
        start = time.perf_counter()
        model.train()
        order = torch.randperm(len(train_samples), generator=shuffled).tolist()
        for batch in batches([train_samples[i] for i in order], args.batch_size, model.config.pad_token_id):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        result.seconds += time.perf_counter() - start
        result.scores.append(task.score([row.argmax(-1) for row in predict(model, held_out, args)], held_out))
        print(f"{result.name}, epoch {epoch + 1}: {task.score_name} {result.scores[-1]:.3f}", flush=True)


def save_and_reload(task: Task, model: nn.Module, held_out: list[dict], args: argparse.Namespace) -> None:
    """Save the adapter, open it by its folder alone, and see that it predicts the same."""
    folder = args.output / "adapter"
    model.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if "lora" not in key]
    again = task.adapter_class.from_pretrained(folder, num_labels=len(task.labels))
    for one, other in zip(predict(model, held_out, args), predict(again, held_out, args), strict=True):
        torch.testing.assert_close(one, other)
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"\nsaved {size / 2**20:.2f} MiB, the head in {', '.join(heads)}")
    print(f"opened again: predictions of {len(held_out)} held-out samples are equal")


def results_table(task: Task, results: list[Result]) -> str:
    """The results as aligned plain text."""
    rows = [["trained", "parameters", "seconds", f"held-out {task.score_name}"]]
    return table(rows + [[r.name, f"{r.trained:,}", f"{r.seconds:.0f}", f"{r.scores[-1]:.3f}"] for r in results])


def plot(task: Task, results: list[Result], chance: float, file: Path) -> None:
    """Save the held-out score over epochs as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for result in results:
        epochs = range(1, len(result.scores) + 1)
        axes.plot(epochs, result.scores, marker="o", label=f"{result.name} ({result.trained:,})")
    axes.axhline(chance, linestyle=":", color="gray", label="most frequent class")
    axes.set(xlabel="epoch", ylabel=f"held-out {task.score_name}", title=task.name.replace("_", " "), ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(title="trained (parameters)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(task: Task, chance: Callable, argv: list[str] | None = None) -> list[Result]:
    """Train in three ways, save and reload the adapter, print a table and save a plot."""
    args = parse_args(task, argv)
    logging.set_verbosity_error()  # a fresh head is what we want, so nobody need be told of it
    logging.disable_progress_bar()
    base = args.output / "base"
    save_base(base, args)
    train_samples, held_out = task.read(AutoTokenizer.from_pretrained(base))
    if args.quick:
        train_samples, held_out = train_samples[::12], held_out[::12]
    print(f"{len(train_samples)} samples to train on, {len(held_out)} held out", flush=True)

    results = []
    for name in (HEAD, LORA, FULL):
        model = prepare(name, task, make_model(task, base, args.seed))
        results.append(Result(name, sum(p.numel() for p in model.parameters() if p.requires_grad)))
        train(results[-1], task, model, (train_samples, held_out), args)
        if name == LORA:
            save_and_reload(task, model, held_out, args)
    plot(task, results, chance(held_out), args.output / "scores.png")
    print(f"\n{results_table(task, results)}\n\nsaved in {args.output}: base/, adapter/ and the plot scores.png")
    return results
