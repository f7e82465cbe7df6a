# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the example measures at each stage, and how it prints and plots it."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

from peft import PeftModel


matplotlib.use("Agg")  # a file is all we want, so no display is needed


@dataclass
class Stage:
    """One row of the table."""

    name: str
    tie_held: bool
    logits: torch.Tensor
    loss: float
    trainable: int
    peak_memory: int
    file_size: int | None = None
    difference: float | None = None

    def row(self) -> list[str]:
        return [
            self.name,
            "yes" if self.tie_held else "NO",
            "-" if self.difference is None else f"{self.difference:.1e}",
            f"{self.loss:.4f}",
            f"{self.trainable:,}",
            "-" if self.file_size is None else f"{self.file_size / 2**20:.1f} MiB",
            f"{self.peak_memory / 2**20:,.0f} MiB",
        ]


HEADER = [
    "stage",
    "tie held",
    "max |logit - trained|",
    "held-out loss",
    "trainable",
    "on disk",
    "peak memory so far",
]


def tie_held(model: torch.nn.Module) -> bool:
    """Whether the input embedding and the output head are one and the same parameter, adapted or not."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def measure(name: str, model: torch.nn.Module, blocks: list[dict], folder: Path | None = None) -> Stage:
    """Look at `model` as it is now; `folder` is where it was saved, if it was."""
    model.eval()
    return Stage(
        name=name,
        logits=exact_logits(model, blocks[0]),
        tie_held=tie_held(model),  # after the logits, so that a change of dtype has to keep the tie too
        loss=mean_loss(model, blocks),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_memory=peak_memory(),
        file_size=weight_file_size(folder) if folder else None,
    )


@torch.no_grad()
def exact_logits(model: torch.nn.Module, block: dict) -> torch.Tensor:
    """Logits of one block, (sequence, vocabulary), computed in float64.

    Rounding in a float32 forward pass alone moves logits of this size by up to 1e-4. In float64 what remains is what
    we want to see: how far the weights are from those of another stage.
    """
    logits = model.double()(input_ids=block["input_ids"][None]).logits[0]
    model.float()
    return logits


@torch.no_grad()
def mean_loss(model: torch.nn.Module, blocks: list[dict]) -> float:
    """Mean loss over all blocks, in nats per token."""
    losses = [model(input_ids=block["input_ids"][None], labels=block["labels"][None]).loss for block in blocks]
    return torch.stack(losses).mean().item()


def weight_file_size(folder: Path) -> int:
    """Bytes of the weight files in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compare(stages: list[Stage], reference: Stage) -> None:
    """Fill in how far the logits of each of `stages` are from those of `reference`."""
    for stage in stages:
        stage.difference = (stage.logits - reference.logits).abs().max().item()


def table(stages: list[Stage]) -> str:
    """The stages as an aligned plain-text table."""
    rows = [HEADER] + [stage.row() for stage in stages]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def plot_loss(history: list[dict], file: Path) -> None:
    """Save the training loss over steps as a picture; `history` is the log of the Trainer."""
    import matplotlib.pyplot as plt

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(*zip(*points, strict=True), marker=".")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="Tied embeddings + LoRA")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
