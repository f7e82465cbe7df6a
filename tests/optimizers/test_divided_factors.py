# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Optimisers on factors that several processes divide among them (FSDP2)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.processes import process_group, run_processes
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


LIMIT, LR = 120, 1e-2
X = torch.linspace(-1, 1, 24).view(3, 8)
MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "LoRA+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=4),
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, r=3, lora_alpha=3, lr=LR, weight_decay=0.1),
    "Riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=LR, reg=0.1),
}


def trained(name: str, divide: Callable[[nn.Module], object] = lambda model: None) -> dict[str, torch.Tensor]:
    """Make two steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False, lora_bias=True)
    model = get_peft_model(net, config)
    divide(model)
    optimizer = MAKE[name](model)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    whole = {key: getattr(p, "full_tensor", lambda p=p: p)() for key, p in model.named_parameters()}
    return {key: tensor.detach() for key, tensor in whole.items()}


def worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group(rank, folder, LIMIT):
        mesh = init_device_mesh("cpu", (2,))
        found = {name: trained(name, partial(fully_shard, mesh=mesh)) for name in MAKE}
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    found = torch.load(run_processes(worker, tmp_path, LIMIT) / "found.pt")
    for name in MAKE:
        torch.testing.assert_close(found[name], trained(name), rtol=1e-4, atol=1e-5)
