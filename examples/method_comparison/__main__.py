# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which method should I use? Every registered one on the same small task, with the same budget."""

import argparse
import csv
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev

import matplotlib
import torch
from examples.method_comparison.base import Base, Texts, bits_per_byte, read_texts, train
from examples.method_comparison.methods import RATES, config_of, methods, setup_of
from examples.tables import table
from tqdm import tqdm

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
    seconds = train(model, texts.train, steps, rate, seed, extra)
    target = folder / f"{method}-{rate}-{seed}"
    model.save_pretrained(target)
    return {
        "validation": bits_per_byte(model, texts.validation, extra),
        "test": bits_per_byte(model, texts.test, extra),
        "trained": trained,
        "seconds": seconds,
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


def as_table(results: list[Result], before: float) -> str:
    """Write the results for people, the best first."""
    head = ["method", "bits per byte", "+-", "trained", "ms per step", "KB on disk", "rate"]
    rows = [
        [
            r.method,
            f"{r.bits:.3f}",
            f"{r.spread:.3f}",
            f"{r.trained:,}",
            f"{r.milliseconds:.1f}",
            f"{r.kilobytes:.1f}",
            f"{r.rate:g}",
        ]
        for r in sorted(results, key=lambda r: r.bits)
    ]
    return table([head, *rows, ["(no adapter)", f"{before:.3f}", "", "0", "", "", ""]])


def draw(results: list[Result], before: float, path: Path) -> None:
    """Plot quality over what is trained."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    axes.axhline(before, color="0.6", linestyle="--", linewidth=1)
    axes.annotate("no adapter", (1, before), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
    axes.errorbar([r.trained for r in results], [r.bits for r in results], [r.spread for r in results], fmt="o")
    for r in results:
        axes.annotate(r.method, (r.trained, r.bits), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trained numbers", ylabel="bits per byte of unseen code (lower is better)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[Result]:
    """Compare the methods; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, one learning rate, one seed: two minutes")
    parser.add_argument("--methods", nargs="*", help="names; all that are registered if left out")
    parser.add_argument("--steps", type=int, help="batches that an adapter is trained on")
    parser.add_argument("--seeds", type=int, help="how often it is trained")
    parser.add_argument("--output", type=Path, default=Path("outputs/method_comparison"))
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (10 if arguments.quick else 150)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)

    texts = read_texts()
    base = Base(texts, steps=50 if arguments.quick else 1500)
    before = bits_per_byte(base.copy(), texts.test, {})
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for method in tqdm(arguments.methods or methods(), desc="methods"):
            results.append(compare(method, base, texts, arguments, Path(folder)))
    print(as_table(results, before))
    with (arguments.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(map(asdict, results))
    draw(results, before, arguments.output / "comparison.png")
    print(f"saved in {arguments.output}")
    return results


if __name__ == "__main__":
    main()
