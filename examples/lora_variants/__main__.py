# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which LoRA should I use? Every start, variant and optimiser on the same small task, with the same rank."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import matplotlib
import torch
from examples.comparisons import parse, parser_for, write_csv
from examples.lora_variants.settings import Setting, batches_of, settings, size_of
from examples.small_model import Base, Texts, bits_per_byte, read_texts, train
from examples.tables import table
from tqdm import tqdm


# the rates that are tried with the first seed; the best one on the validation text is kept
RATES = (2e-3, 1e-2, 5e-2)


@dataclass(frozen=True)
class Result:
    """
    What a form of LoRA has reached.

    Attributes:
        name: its name.
        kind: what it is: a start, a variant, an optimiser.
        start: bits per byte of the test text before training.
        bits: the same after it, the mean over the seeds; fewer are better.
        spread: their standard deviation.
        trained: numbers that were trained.
        milliseconds: per step.
        kilobytes: of the saved adapter.
        rate: learning rate that was chosen.
        losses: of each step, the mean over the seeds.
    """

    name: str
    kind: str
    start: float
    bits: float
    spread: float
    trained: int
    milliseconds: float
    kilobytes: float
    rate: float
    losses: list[float]


def run(setting: Setting, base: Base, texts: Texts, steps: int, rate: float, seed: int) -> dict:
    """Train one adapter from a seed, and measure it."""
    torch.manual_seed(seed)
    model = setting.adapt(base.copy(), setting.config(), batches_of(texts.train, 4, seed))
    start = bits_per_byte(model, texts.test)
    training = train(model, texts.train, steps, rate, seed, optimizer_of=setting.optimizer_of)
    return {
        "start": start,
        "validation": bits_per_byte(model, texts.validation),
        "test": bits_per_byte(model, texts.test),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "kilobytes": size_of(model),
        **training._asdict(),
    }


def compare(setting: Setting, base: Base, texts: Texts, arguments: argparse.Namespace) -> Result:
    """Choose the rate with the first seed, and repeat it with the others."""
    rates = RATES[1:2] if arguments.quick else RATES
    tried = {rate: run(setting, base, texts, arguments.steps, rate, 0) for rate in rates}
    rate = min(tried, key=lambda rate: tried[rate]["validation"])
    runs = [tried[rate], *(run(setting, base, texts, arguments.steps, rate, s) for s in range(1, arguments.seeds))]
    bits = [found["test"] for found in runs]
    return Result(
        name=setting.name,
        kind=setting.kind,
        start=mean(found["start"] for found in runs),
        bits=mean(bits),
        spread=pstdev(bits),
        trained=runs[0]["trained"],
        milliseconds=1000 * min(found["seconds"] for found in runs),
        kilobytes=runs[0]["kilobytes"],
        rate=rate,
        losses=[mean(step) for step in zip(*(found["losses"] for found in runs), strict=True)],
    )


def as_table(results: list[Result]) -> str:
    """Write the results for people, the best first."""
    head = ["form of LoRA", "kind", "bits per byte", "+-", "at the start", "trained", "ms per step", "KB", "rate"]
    rows = [
        [
            r.name,
            r.kind,
            f"{r.bits:.3f}",
            f"{r.spread:.3f}",
            f"{r.start:.3f}",
            f"{r.trained:,}",
            f"{r.milliseconds:.1f}",
            f"{r.kilobytes:.1f}",
            f"{r.rate:g}",
        ]
        for r in sorted(results, key=lambda r: r.bits)
    ]
    return table([head, *rows])


def smooth(losses: list[float]) -> list[float]:
    """Average over up to ten steps."""
    return [mean(losses[max(0, step - 9) : step + 1]) for step in range(len(losses))]


def draw(results: list[Result], path: Path) -> None:
    """Plot the losses of each kind beside plain LoRA's, and the quality that was reached."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = [r for r in results if r.name == "LoRA"]
    kinds = sorted({r.kind for r in results})
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(5 * (len(kinds) + 1), 5), layout="constrained")
    for kind, axis in zip(kinds, axes, strict=False):
        for r in plain:
            axis.plot(smooth(r.losses), color="black", linewidth=2, label="LoRA")
        for r in results:
            if r.kind == kind and r not in plain:
                axis.plot(smooth(r.losses), linewidth=1, label=r.name)
        axis.set(title=f"{kind}s", xlabel="step", ylabel="loss on code, mean of ten steps")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    ranked = sorted(results, key=lambda r: -r.bits)
    colours = dict(zip(kinds, ("tab:blue", "tab:orange", "tab:green"), strict=False))
    axes[-1].barh([r.name for r in ranked], [r.bits for r in ranked], xerr=[r.spread for r in ranked],
                  color=[colours.get(r.kind, "0.5") for r in ranked])  # fmt: skip
    low = min(r.bits - r.spread for r in ranked)
    axes[-1].set(title="after training", xlabel="bits per byte of unseen code (lower is better)")
    axes[-1].set_xlim(left=0.95 * low)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[Result]:
    """Compare the forms of LoRA; see `--help`."""
    parser = parser_for("lora_variants", __doc__, quick="a few steps, one learning rate, one seed: a minute")
    parser.add_argument("--only", nargs="*", help="names, as the table has them; all if left out")
    arguments = parse(parser, argv)

    available = settings()
    unknown = set(arguments.only or ()) - set(available)
    if unknown:
        parser.error(f"no form of LoRA is called {', '.join(sorted(unknown))}; choose from {', '.join(available)}")
    texts = read_texts()
    base = Base(texts, steps=50 if arguments.quick else 1500)
    chosen = [available[name] for name in arguments.only or available]
    results = [compare(setting, base, texts, arguments) for setting in tqdm(chosen, desc="forms of LoRA")]
    print(as_table(results))
    write_csv(results, arguments.output / "results.csv", without=["losses"])
    draw(results, arguments.output / "comparison.png")
    print(f"saved in {arguments.output}")
    return results


if __name__ == "__main__":
    main()
