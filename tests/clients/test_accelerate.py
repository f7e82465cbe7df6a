# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Two processes train a tied model through `Accelerator`, save it in each way there is, and load it."""

import os
from pathlib import Path

import pytest
import torch
from support.processes import WORLD, process_group, run_processes
from support.tied_models import llama
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, weight_tying_report


CLIENT = "accelerate"
pytestmark = pytest.mark.wide  # two processes that each import everything

STEPS, LIMIT = 3, 200.0
ROUTES = {
    "saved": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]},
    "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [1, 3, 5]},
}
# how accelerate distributes; "lean" is with `cpu_ram_efficient_loading`, which moves the model to the meta device
WRAPPINGS = ("ddp", "fsdp2", "fsdp2_lean")
CASES = [(wrapping, route) for wrapping in WRAPPINGS for route in ROUTES]


def build(route: str) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, **ROUTES[route], ensure_weight_tying=True, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward, mine: slice) -> None:
    """Take some steps, each with four samples; with two processes each takes two of them."""
    for step in range(STEPS):
        ids = torch.randint(0, 48, (4, 6), generator=torch.Generator().manual_seed(step))[mine]
        backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()


def accelerator(wrapping: str):
    """An accelerator on the CPU. It would not shard there by itself, although torch can, so it is told to."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(cpu=True)
    if wrapping != "ddp":
        made.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=wrapping == "fsdp2_lean",
        )
    return made


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give what is trained, put together from all processes."""
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in trained.items()}


def run(rank: int, wrapping: str, route: str, folder: Path) -> dict:
    """Train, save in three ways, forget what was learned, and load it again in two."""
    from accelerate.utils import fsdp_utils

    wanted = accelerator(wrapping)
    model = build(route)
    model, optimizer = wanted.prepare(model, optimizer_of(model))
    train(model, optimizer, wanted.backward, slice(2 * rank, 2 * rank + 2))
    result = {"type": str(wanted.distributed_type), "trained": whole(model), "model": type(model).__name__}

    state = wanted.get_state_dict(model)
    if wanted.is_main_process:
        wanted.unwrap_model(model).save_pretrained(folder / "adapter", state_dict=state)
    wanted.save_state(folder / "state")
    wanted.wait_for_everyone()

    def forget() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()

    forget()
    wanted.load_state(folder / "state")
    result["loaded"] = whole(model)
    if wrapping != "ddp":  # what Trainer does with an adapter
        plugin = wanted.state.fsdp_plugin
        (folder / "only").mkdir(exist_ok=True)
        fsdp_utils.save_fsdp_model(plugin, wanted, model, folder / "only", adapter_only=True)
        wanted.wait_for_everyone()
        forget()
        fsdp_utils.load_fsdp_model(plugin, wanted, model, folder / "only", adapter_only=True)
        result["loaded_only"] = whole(model)
    result["holds"] = weight_tying_report(model).holds
    result["optimised"] = sum(len(group["params"]) for group in optimizer.param_groups)
    return result


def worker(rank: int, folder: str) -> None:
    """Run every case; one start of a process costs more than all of them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, and not used: the group is there already
    with process_group(rank, folder, LIMIT):
        for wrapping, route in CASES:
            place = Path(folder) / f"{wrapping}-{route}"
            place.mkdir(exist_ok=True)
            torch.save(run(rank, wrapping, route, place), place / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes have written."""
    return run_processes(worker, tmp_path_factory.mktemp("accelerate"), LIMIT)


@pytest.mark.parametrize(("wrapping", "route"), CASES)
def test_two_processes_train_save_and_load(wrapping, route, folder):
    model = build(route)
    optimizer = optimizer_of(model)
    train(model, optimizer, torch.Tensor.backward, slice(None))
    expected = whole(model)
    for rank in range(WORLD):
        result = torch.load(folder / f"{wrapping}-{route}" / f"{rank}.pt")
        kind, cls = ("MULTI_CPU", "DistributedDataParallel") if wrapping == "ddp" else ("FSDP", "FSDP")
        assert result["type"] == f"DistributedType.{kind}" and result["model"].startswith(cls)
        trained = {name.removeprefix("module."): tensor for name, tensor in result["trained"].items()}
        torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["loaded"], result["trained"], rtol=0.0, atol=0.0)
        if wrapping != "ddp":
            torch.testing.assert_close(result["loaded_only"], result["trained"], rtol=0.0, atol=0.0)
        assert result["holds"]
        assert result["optimised"] == sum(p.requires_grad for p in model.parameters())

    loaded = PeftModel.from_pretrained(llama(), folder / f"{wrapping}-{route}" / "adapter")
    assert weight_tying_report(loaded).holds
    torch.testing.assert_close(
        get_peft_model_state_dict(loaded), get_peft_model_state_dict(model), rtol=1e-5, atol=1e-5
    )
