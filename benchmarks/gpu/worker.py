# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Measure rows with one package: prints a line `ROW {json}` for each.

The ways of a row are measured in turn on one base model, so that their ratios are of one run.
"""

import argparse
import contextlib
import gc
import json
import re
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from models import RANK, adapt_by_hand, make_model, release_from_hand
from roofline import Roofline, peaks
from rows import ROWS, TARGETS, Row
from torch import nn


class Machine:
    """
    Where everything runs, and how time and memory are measured there.

    Args:
        device: "cuda" or "cpu".
        is_trial: measure once only, to try the program out.
    """

    def __init__(self, device: str, is_trial: bool) -> None:
        self.device, self.is_trial = device, is_trial
        self.has_gpu = device == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any], repeat: int = 6, warm: int = 3) -> float:
        """Give the median time of a function; on a GPU by its own clock."""
        repeat, warm = (1, 1) if self.is_trial else (repeat, warm)
        for _ in range(warm):
            function()
        self.wait()
        times = []
        for _ in range(repeat):
            if self.has_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                self.wait()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                function()
                times.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(times)

    def peak_gb(self, function: Callable[[], Any]) -> float | None:
        """Give the peak of memory in a function, beyond what is held before; None without a GPU."""
        if not self.has_gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        self.wait()
        return (torch.cuda.max_memory_allocated() - held) / 1e9


@contextlib.contextmanager
def adapted(base: nn.Module, row: Row, way: str) -> Iterator[nn.Module]:
    """Adapt the model in one way, and give back the base model afterwards."""
    if way == "base":
        yield base
        return
    if way == "hand":
        yield adapt_by_hand(base, TARGETS, torch.bfloat16 if row.narrow else torch.float32)
        release_from_hand(base)
        return
    import peft

    model = peft.get_peft_model(base, config_of(row), autocast_adapter_dtype=not row.narrow)
    for number in range(1, row.adapters):
        model.add_adapter(f"a{number}", config_of(row))
    off = peft.disable_fused() if way == "ladder" else contextlib.nullcontext()
    with off:
        yield model
    model.unload()
    base.requires_grad_(False)


def config_of(row: Row) -> Any:
    """Make the config of a row."""
    import peft

    fields: dict[str, Any] = {"target_modules": TARGETS, **row.config}
    if row.method == "LoraConfig":
        fields = {"r": RANK, "lora_alpha": 2 * fields.get("r", RANK), "init_lora_weights": False, **fields}
    elif row.method == "IA3Config":
        fields |= {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        fields["init_ia3_weights"] = False
    elif row.method == "LoHaConfig":
        fields |= {"r": RANK, "alpha": RANK, "init_weights": False}
    else:
        fields["init_weights"] = False
    return getattr(peft, row.method)(**fields)


def step_of(model: nn.Module, row: Row, machine: Machine, is_base: bool) -> Callable[[], None]:
    """Make a step of training: forward, backward and the optimiser. The base model gives its inputs gradients."""
    model.train()
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=machine.has_gpu) if trained else None
    embeddings = model.get_input_embeddings()
    ids = torch.randint(0, 200, (row.batch, row.length), device=machine.device)
    kept = min(64, row.length)

    def step() -> None:
        with torch.autocast(machine.device, torch.bfloat16, enabled=row.autocast):
            given = {"input_ids": ids}
            if is_base:
                given = {"inputs_embeds": embeddings(ids).detach().requires_grad_(True)}
            logits = model(**given, use_cache=False, logits_to_keep=kept).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, -kept:].flatten())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def forward_of(model: nn.Module, row: Row, machine: Machine, way: str) -> tuple[Callable[[], None], int]:
    """Make a call without gradients, and say how many tokens it generates; 1 if it only reads a prompt."""
    model.eval()
    ids = torch.randint(0, 200, (row.batch, row.length), device=machine.device)
    names = {}
    if row.adapters > 1 and way not in ("base", "hand"):
        names["adapter_names"] = ["default", *(f"a{number}" for number in range(1, row.adapters))][: row.batch]
    if row.kind == "prefill":
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1, **names)), 1
    new = 2 if machine.is_trial else 24
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return torch.no_grad()(lambda: model.generate(input_ids=ids, attention_mask=mask, **settings, **names)), new


def lifecycle(model: nn.Module, machine: Machine) -> dict[str, float]:
    """Measure saving, loading a second adapter, and switching."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, act in {
            "save_s": lambda: model.save_pretrained(folder),
            "load_second_s": lambda: model.load_adapter(folder, "second"),
        }.items():
            machine.wait()
            begun = time.perf_counter()
            act()
            machine.wait()
            found[name] = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(10):
        model.set_adapter("second")
        model.set_adapter("default")
    found["ms"] = (time.perf_counter() - begun) / 20 * 1e3
    return found


def measure(base: nn.Module, row: Row, way: str, machine: Machine, peak: tuple[float, float]) -> dict[str, Any]:
    """Measure one way of a row."""
    with adapted(base, row, way) as model:
        if row.kind == "lifecycle":
            return {} if way == "base" else lifecycle(model, machine)
        with contextlib.ExitStack() as stack:
            if row.kind == "step":
                act, count = step_of(model, row, machine, way == "base"), 1
                if row.checkpointing:
                    stack.callback(base.gradient_checkpointing_disable)
                    stack.callback(base.disable_input_require_grads)
            else:
                act, count = forward_of(model, row, machine, way)
            is_token = row.kind == "token"
            found = {"ms": machine.milliseconds(act, 3 if is_token else 6, 1 if is_token else 3) / count}
            found["peak_gb"] = machine.peak_gb(act)
            if row.kind != "token":
                bound = Roofline(*peak)
                try:
                    with bound:
                        act()
                    found |= {"flops": bound.flops, "bytes": bound.bytes, "bound_ms": bound.seconds * 1e3}
                except Exception:  # an operation that cannot be counted; its time is known all the same
                    traceback.print_exc()
            return found


def main() -> None:
    """Measure all rows that are asked for."""
    parser = argparse.ArgumentParser()
    for name in ("--ways", "--only", "--shape", "--device"):
        parser.add_argument(name)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    machine = Machine(arguments.device, is_trial=arguments.shape == "tiny")
    peak = peaks(arguments.device, lambda f: machine.milliseconds(f) / 1e3)
    import peft

    print(
        "MACHINE "
        + json.dumps(
            {
                "name": torch.cuda.get_device_name() if machine.has_gpu else "CPU",
                "torch": torch.__version__,
                "peft": peft.__version__,
                "shape": arguments.shape,
                "flops_per_s": peak[0],
                "bytes_per_s": peak[1],
            }
        ),
        flush=True,
    )
    models: dict[int, nn.Module] = {}
    for name, row in ROWS.items():
        if not re.search(arguments.only, name):
            continue
        layers = min(row.layers or 99, arguments.layers or 99)
        if layers not in models:
            models.clear()
            gc.collect()
            models[layers] = make_model(arguments.shape, arguments.device, None if layers == 99 else layers)
        result: dict[str, Any] = {"row": name}
        for way in arguments.ways.split(","):
            if way == "hand" and not row.is_lora:
                continue
            if way == "ladder" and row.method != "LoraConfig":
                continue
            try:
                result[way] = measure(models[layers], row, way, machine, peak)
            except Exception as error:  # the other rows are measured all the same
                traceback.print_exc()
                result[way] = {"error": f"{type(error).__name__}: {error}"[:300]}
                models.clear()
                gc.collect()
                models[layers] = make_model(arguments.shape, arguments.device, None if layers == 99 else layers)
            gc.collect()
            if machine.has_gpu:
                torch.cuda.empty_cache()
        print("ROW " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
