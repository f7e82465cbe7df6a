# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Two processes on one machine train a tied model as one process does, and it stays tied."""

import copy
from pathlib import Path

import pytest
import torch
from support.processes import WORLD, process_group, run_processes
from support.tied_models import llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft import LoraConfig, PeftModel, get_peft_model, weight_tying_report


STEPS, LIMIT = 3, 50.0
ROUTES = {
    "saved": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]},
    "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
CASES = [(wrapping, route) for wrapping in ("ddp", "fsdp2") for route in ROUTES]


def build(route: str) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, **ROUTES[route], ensure_weight_tying=True, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)


def batch(step: int) -> torch.Tensor:
    """Give four samples; with two processes each takes two of them."""
    return torch.randint(0, 48, (4, 6), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, mine: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for step in range(STEPS):
        ids = batch(step)[mine]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give what is trained, whole and under the names that it has in one process."""
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named(model) if p.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def shard(model: PeftModel) -> nn.Module:
    """Shard every block by itself and the rest, with the tied modules, as one group."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank: int, folder: str) -> None:
    """Train every case; one start of a process costs more than all of them."""
    with process_group(rank, folder, LIMIT):
        for wrapping, route in CASES:
            model = build(route)
            wrapped = shard(model) if wrapping == "fsdp2" else DistributedDataParallel(model)
            train(wrapped, slice(2 * rank, 2 * rank + 2))
            result = {
                "trained": trainable(model),
                "report": weight_tying_report(model).to_dict(),
                "optimized": sum(p.requires_grad for p in model.parameters()),
            }
            torch.save(result, f"{folder}/{wrapping}-{route}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes have written."""
    return run_processes(worker, tmp_path_factory.mktemp("distributed"), LIMIT)


@pytest.mark.parametrize(("wrapping", "route"), CASES)
def test_two_processes_train_as_one(wrapping, route, folder):
    model = build(route)
    start = copy.deepcopy(trainable(model))
    train(model, slice(None))
    expected = trainable(model)
    assert all(not torch.allclose(expected[name], start[name], atol=1e-3) for name in expected)
    report = weight_tying_report(model)
    for rank in range(WORLD):
        result = torch.load(folder / f"{wrapping}-{route}-{rank}.pt")
        torch.testing.assert_close(result["trained"], expected, rtol=1e-5, atol=1e-5)
        assert result["report"]["holds"]
        assert [row["route"] for row in result["report"]["rows"]] == [row.route for row in report.rows]
        assert result["optimized"] == sum(p.requires_grad for p in model.parameters())
