# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on Megatron's own parallel layers, in one process and in two, which communicate over gloo on a CPU."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from peft import LoraConfig, PeftModel, get_peft_model


CLIENT = "megatron-core"
pytestmark = pytest.mark.own_environment
R, NARROW, WIDE = 4, 8, 16
SHAPES = {"up_a": (R, NARROW), "up_b": (WIDE, R), "down_a": (R, WIDE), "down_b": (NARROW, R), "x": (6, 3, NARROW)}


def meet(rank: int, size: int, folder: Path, divides_sequence: bool = False) -> dict[str, Any]:
    """Let the processes know each other; give the arguments of Megatron's own config."""
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=120), rank=rank, world_size=size)
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"  # Megatron asks, whatever the tensors are on
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return {
        "num_layers": 1,
        "hidden_size": NARROW,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": size,
        "params_dtype": torch.float32,
        "sequence_parallel": divides_sequence,
    }


def mlp(settings: dict[str, Any]) -> nn.Module:
    """Make a column parallel layer, and a row parallel one behind it."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = {"config": TransformerConfig(**settings), "init_method": nn.init.normal_, "bias": True}
            self.up = ColumnParallelLinear(NARROW, WIDE, **own, gather_output=False)
            self.down = RowParallelLinear(WIDE, NARROW, **own, input_is_parallel=True, skip_bias_add=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output, bias = self.down(torch.relu(self.up(x)[0]))
            return output + bias

    torch.manual_seed(0)
    return Mlp()


def gathered(part: torch.Tensor, axis: int) -> torch.Tensor:
    """Put the parts of a tensor together that processes have."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts, axis)


def work(rank: int, size: int, divides_sequence: bool, folder: Path) -> None:
    """Adapt, compare with the same model undivided, save, load and merge, in one of the processes."""
    settings = meet(rank, size, folder, divides_sequence)
    net = mlp(settings)
    model = get_peft_model(net, LoraConfig(r=R, target_modules=["up", "down"], megatron_config=settings))
    up, down = net.up, net.down
    generator = torch.Generator().manual_seed(1)
    whole = {name: torch.randn(*shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}
    factors = {
        "up_a": (up.lora_A, None),
        "up_b": (up.lora_B, 0),
        "down_a": (down.lora_A, 1),
        "down_b": (down.lora_B, None),
    }
    x = whole.pop("x")
    with torch.no_grad():
        for name, (container, axis) in factors.items():
            container["default"].weight.copy_(whole[name] if axis is None else whole[name].chunk(size, axis)[rank])

    leaves = {name: tensor.requires_grad_() for name, tensor in whole.items()}
    scaling = up.scaling["default"]
    upper = gathered(up.base_layer.weight, 0) + scaling * leaves["up_b"] @ leaves["up_a"]
    lower = gathered(down.base_layer.weight, 1) + scaling * leaves["down_b"] @ leaves["down_a"]
    hidden = torch.relu(x @ upper.T + gathered(up.base_layer.bias, 0))
    expected = hidden @ lower.T + down.base_layer.bias.detach()
    expected.square().sum().backward()
    if divides_sequence:
        x, expected = (tensor.chunk(size, 0)[rank] for tensor in (x, expected))

    output = model(x)
    assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    for name, (container, axis) in factors.items():
        parameter, wanted = container["default"].weight, leaves[name].grad
        if getattr(parameter, "sequence_parallel", False):  # Megatron does so before its optimiser steps
            dist.all_reduce(parameter.grad)
        assert_close(parameter.grad, wanted if axis is None else wanted.chunk(size, axis)[rank], rtol=1e-3, atol=1e-3)

    with torch.no_grad():
        model.merge_adapter()
        assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        own = folder / f"part_{rank}"
        model.save_pretrained(own)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(mlp(settings), own, low_cpu_mem_usage=low_cpu_mem_usage)
            assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
        assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "divides_sequence"), [(1, False), (2, False), (2, True)])
def test_parts_compute_what_the_whole_does(size: int, divides_sequence: bool, tmp_path: Path) -> None:
    mp.spawn(work, (size, divides_sequence, tmp_path), nprocs=size)


def start(rank: int, size: int, folder: Path) -> None:
    """Make a fresh adapter: parts of factor A have numbers of their own, what is whole is the same everywhere."""
    settings = meet(rank, size, folder)
    net, x = mlp(settings), torch.ones(2, 1, NARROW)
    before = net(x)
    get_peft_model(net, LoraConfig(r=R, target_modules=["up", "down"], megatron_config=settings))
    assert_close(net(x), before)
    assert not torch.equal(*gathered(net.down.lora_A["default"].weight, 1).chunk(size, 1))
    assert torch.equal(*gathered(net.up.lora_A["default"].weight, 0).chunk(size, 0))
    dist.destroy_process_group()


def test_a_fresh_adapter_changes_nothing(tmp_path: Path) -> None:
    mp.spawn(start, (2, tmp_path), nprocs=2)
