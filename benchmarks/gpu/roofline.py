# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a machine could reach at best: flops and bytes of each operation, against what the machine has measured."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Roofline(TorchDispatchMode):
    """
    Count flops and bytes of all operations that run inside, and the time that they take at best.

    Each operation is taken to read its inputs once and to write its outputs once; of the times for its flops and for
    its bytes the longer one counts. Views cost nothing.

    Args:
        flops_per_s: the machine's, for products of bfloat16 matrices.
        bytes_per_s: the machine's.

    Attributes:
        flops: counted.
        bytes: counted.
        seconds: at best.
    """

    def __init__(self, flops_per_s: float, bytes_per_s: float) -> None:
        super().__init__()
        self.flops_per_s, self.bytes_per_s = flops_per_s, bytes_per_s
        self.flops = self.bytes = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute an operation and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if getattr(func, "is_view", False) or packet in _COST_NOTHING:
            return out
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        self.flops += flops
        self.bytes += moved
        self.seconds += max(flops / self.flops_per_s, moved / self.bytes_per_s)
        return out


_aten = torch.ops.aten
_COST_NOTHING = {_aten.detach, _aten.view, _aten._unsafe_view, _aten.t, _aten.expand, _aten.empty, _aten.empty_like}


def peaks(device: str, seconds: Any) -> tuple[float, float]:
    """
    Measure what a machine reaches: flops per second of a large product, bytes per second of a large copy.

    Args:
        device: the device.
        seconds: gives the seconds that a function takes.
    """
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.empty(size * size * 8, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    flops = 2 * size**3 / seconds(lambda: a @ a)
    return flops, 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
