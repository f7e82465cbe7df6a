# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which method should I use? Every registered one on the same small task, with the same budget."""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
from examples.comparisons import parse, parser_for, write_csv
from examples.method_comparison.comparing import Result, compare
from examples.method_comparison.methods import methods
from examples.small_model import Base, bits_per_byte, read_texts
from examples.tables import table
from tqdm import tqdm


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
    parser = parser_for("method_comparison", __doc__, quick="a few steps, one learning rate, one seed: two minutes")
    parser.add_argument("--methods", nargs="*", help="names; all that are registered if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    arguments = parse(parser, argv)

    texts = read_texts()
    base = Base(texts, steps=50 if arguments.quick else 1500)
    before = bits_per_byte(base.copy(), texts.test, {})
    chosen = arguments.methods or methods()
    with tempfile.TemporaryDirectory() as folder:
        work = partial(compare, base=base, texts=texts, arguments=arguments, folder=Path(folder))
        if arguments.jobs > 1:
            pool = ProcessPoolExecutor(arguments.jobs, get_context("spawn"), torch.set_num_threads, (1,))
            with pool:
                results = list(tqdm(pool.map(work, chosen), total=len(chosen), desc="methods"))
        else:
            results = [work(method) for method in tqdm(chosen, desc="methods")]
    print(as_table(results, before))
    write_csv(results, arguments.output / "results.csv")
    draw(results, before, arguments.output / "comparison.png")
    print(f"saved in {arguments.output}")
    return results


if __name__ == "__main__":
    main()
