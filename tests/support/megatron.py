# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A stand-in for Megatron's parallel layers, whose processes are threads."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Threads:
    """Threads that run one function as the processes of Megatron run one program."""

    def __init__(self) -> None:
        self.size, self.local = 1, threading.local()

    @property
    def rank(self) -> int:
        return getattr(self.local, "rank", 0)

    def run(self, size: int, function: Callable[[int], Any]) -> list[Any]:
        """Give what each of them has returned."""
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=60), [None] * size
        results, failures = [None] * size, []

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                failures.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.size = 1
        if failures:
            raise failures[0]
        return results

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Give the tensors of all, to each."""
        if self.size == 1:
            return [tensor]
        self.given[self.rank] = tensor
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given


THREADS = Threads()


class _Sum(torch.autograd.Function):
    """The sum of all parts; each part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return sum(THREADS.exchange(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Copy(torch.autograd.Function):
    """What all have; its gradient is the sum of the parts."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return sum(THREADS.exchange(grad))


@dataclass
class TransformerConfig:
    """As Megatron's own, it takes no unknown arguments and checks what it takes."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int = 1
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.params_dtype, torch.dtype):
            raise TypeError("params_dtype must be a type of tensors")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")


class _Parallel(nn.Module):
    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **settings: Any):
        super().__init__()
        self.input_size, self.output_size, self.config = input_size, output_size, config
        self.__dict__.update(settings)
        outputs, inputs = self.shape
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.init_method(self.weight.data)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        return

    def _with_bias(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class ColumnParallelLinear(_Parallel):
    """Each has some of the output features."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool = True,
                 gather_output: bool = False, skip_bias_add: bool = False):  # fmt: skip
        self.shape = output_size // THREADS.size, input_size
        super().__init__(input_size, output_size, config=config, bias=bias, init_method=init_method,
                         gather_output=gather_output, skip_bias_add=skip_bias_add)  # fmt: skip
        self.output_size_per_partition = self.shape[0]

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._with_bias(F.linear(_Copy.apply(x), self.weight if weight is None else weight))


class RowParallelLinear(_Parallel):
    """Each has some of the input features."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool,
                 input_is_parallel: bool, skip_bias_add: bool):  # fmt: skip
        self.shape = output_size, input_size // THREADS.size
        super().__init__(input_size, output_size, config=config, bias=bias, init_method=init_method,
                         input_is_parallel=input_is_parallel, skip_bias_add=skip_bias_add)  # fmt: skip
        self.input_size_per_partition = self.shape[1]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._with_bias(_Sum.apply(F.linear(x, self.weight)))


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let the stand-in be imported as `megatron.core`, as long as the test runs; the module `tensor_parallel`."""
    modules = {}
    for name in ("megatron", "megatron.core", "megatron.core.tensor_parallel", "megatron.core.transformer",
                 "megatron.core.transformer.transformer_config"):  # fmt: skip
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, modules[name])
    parallel = modules["megatron.core.tensor_parallel"]
    parallel.ColumnParallelLinear, parallel.RowParallelLinear = ColumnParallelLinear, RowParallelLinear
    modules["megatron.core.transformer.transformer_config"].TransformerConfig = TransformerConfig
    return parallel


class Mlp(nn.Module):
    """A column parallel layer, and a row parallel one that takes its output as it is divided."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, bias: bool = True) -> None:
        super().__init__()
        own = {"config": TransformerConfig(1, up.shape[1]), "init_method": nn.init.zeros_, "bias": bias}
        self.up = ColumnParallelLinear(up.shape[1], up.shape[0], **own)
        self.down = RowParallelLinear(down.shape[1], down.shape[0], **own, input_is_parallel=True, skip_bias_add=True)
        self.up.weight.data.copy_(part_of(up, 0))
        self.down.weight.data.copy_(part_of(down, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, bias = self.down(torch.relu(self.up(x)[0]))
        return output if bias is None else output + bias


def part_of(whole: torch.Tensor, axis: int) -> torch.Tensor:
    """Give the part of a tensor that the running thread has."""
    return whole.chunk(THREADS.size, axis)[THREADS.rank]
