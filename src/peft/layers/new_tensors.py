# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where and in which type the tensors of a new adapter are made."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from ..utils.error import PeftTypeError, PeftValueError


# A tensor of an adapter is smaller than the weight that it belongs to, unless the weight is tiny or the rank absurd:
# entries that are always allowed, and how many times those of the weight else. Some starts take the rank squared.
SMALL, TIMES_BASE = 2**16, 8


@dataclass(frozen=True)
class NewTensors:
    """
    How the tensors of an adapter are made.

    Attributes:
        on_meta: make them without storage, to be filled by loading a checkpoint.
        full_precision: keep them in float32 where the base weight is in half precision.
        from_checkpoint: a checkpoint gives them their values, wherever they are made.
    """

    on_meta: bool = False
    full_precision: bool = True
    from_checkpoint: bool = False


_DEFAULT = NewTensors()
_OPTIONS: ContextVar[NewTensors] = ContextVar("new_adapter_tensors", default=_DEFAULT)


@contextmanager
def making_tensors(
    on_meta: bool = False, full_precision: bool = True, from_checkpoint: bool = False
) -> Iterator[None]:
    """Hold options for every adapter tensor that is made inside; what an outer context asks for holds on."""
    outer = _OPTIONS.get()
    options = NewTensors(
        on_meta or outer.on_meta, full_precision and outer.full_precision, from_checkpoint or outer.from_checkpoint
    )
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def on_meta() -> bool:
    """Say whether tensors are made without storage at the moment."""
    return _OPTIONS.get().on_meta


def from_checkpoint() -> bool:
    """Say whether the tensors that are made at the moment get their values from a checkpoint."""
    return _OPTIONS.get().from_checkpoint


def new_parameter(weight: torch.Tensor, *shape: int, device: torch.device | str | int | None = None) -> nn.Parameter:
    """
    Make an uninitialised parameter that belongs to a base weight.

    It is made on the weight's device and in its type, or in float32 where that type cannot be trained well: half
    precision, unless the caller of the injection asked for it, and anything quantised.

    Args:
        weight: the base weight.
        shape: shape of the parameter.
        device: another device, where the weight is offloaded.

    Raises:
        PeftTypeError: if a size is no integer.
        PeftValueError: if the size is absurd; see `check_size`.
    """
    dtype, device = _type_and_device(weight, device)
    check_size(shape, weight, dtype, device)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))


def _type_and_device(weight: torch.Tensor, device: Any) -> tuple[torch.dtype, Any]:
    options, dtype = _OPTIONS.get(), weight.dtype
    if dtype.itemsize < 2 or not dtype.is_floating_point or (options.full_precision and dtype.itemsize < 4):
        dtype = torch.float32
    return dtype, "meta" if options.on_meta else weight.device if device is None else device


def check_new_parameters(
    weight: torch.Tensor, *shapes: tuple[int, ...], device: torch.device | str | int | None = None
) -> None:
    """
    Refuse parameters that `new_parameter` would refuse to make, before anything is changed.

    Args:
        weight: the base weight that they belong to.
        shapes: their shapes.
        device: see `new_parameter`.

    Raises:
        PeftTypeError: if a size is no integer.
        PeftValueError: if a size is absurd; see `check_size`.
    """
    dtype, device = _type_and_device(weight, device)
    for shape in shapes:
        check_size(shape, weight, dtype, device)


def draw_(tensor: torch.Tensor, weight: torch.Tensor, draw: Callable[[torch.Tensor], Any]) -> None:
    """
    Fill a tensor of an adapter with random numbers, the same for a seed on all devices.

    They are drawn on the CPU in float32, and rounded to the type of the base weight if that is half precision: what
    the released package starts with, so that runs can be compared.

    Args:
        tensor: what to fill; nothing is drawn if it has no storage.
        weight: the base weight that it belongs to.
        draw: fills a tensor in place.
    """
    if tensor.is_meta:
        return
    is_half = weight.is_floating_point() and weight.dtype.itemsize == 2
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not is_half:
        draw(tensor)
        return
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    draw(drawn)
    tensor.copy_(drawn.to(weight.dtype) if is_half else drawn)


def check_size(
    shape: tuple[int, ...],
    weight: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | str | int,
    times_base: int = TIMES_BASE,
) -> None:
    """
    Refuse a tensor of an adapter before it is allocated, if no adapter can be meant.

    Args:
        shape: its shape.
        weight: the base weight that it belongs to.
        dtype: its type.
        device: where it would be.
        times_base: how many times the entries of the base weight it may have.

    Raises:
        PeftTypeError: if a size is no integer.
        PeftValueError: if a size is negative, or the tensor is many times as large as the base weight, or larger than
            what memory is left.
    """
    for size in shape:
        if not isinstance(size, int) or size is True or size is False:
            raise PeftTypeError(
                f"sizes of an adapter's tensors are integers, found {shape}; check the config's numbers"
            )
        if size < 0:
            raise PeftValueError(f"sizes of an adapter's tensors cannot be negative, found {shape}; check the config")
    count = math.prod(shape)
    if count <= SMALL:
        return
    bytes_needed = count * dtype.itemsize
    base_count = getattr(weight, "ds_numel", weight.numel())  # DeepSpeed leaves an empty tensor behind
    if count > max(times_base * base_count, max(weight.shape, default=0) ** 2):
        raise PeftValueError(
            f"a tensor of the adapter would have the shape {shape} and take {bytes_needed:,d} bytes, "
            f"more than {times_base} times as many entries as the base weight, which has the shape "
            f"{tuple(weight.shape)}; check the config's rank and other sizes"
        )
    if torch.device(device).type == "cpu" and bytes_needed > (left := psutil.virtual_memory().available):
        raise PeftValueError(
            f"a tensor of the adapter would have the shape {shape} and take {bytes_needed:,d} bytes, and {left:,d} "
            "bytes of memory are left; check the config's rank and other sizes"
        )


def copy_module(module: nn.Module, instead: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """
    Copy a module with its parameters.

    Args:
        module: what to copy. Adapters that are made without storage get a copy without storage.
        instead: id of a parameter -> the parameter that the copy has in its place. These are never copied.
    """
    replaced: dict[int, torch.Tensor] = dict(instead or {})
    if on_meta():
        for parameter in module.parameters():
            replaced.setdefault(id(parameter), nn.Parameter(torch.empty_like(parameter, device="meta")))
    for child in module.modules():
        for value in vars(child).values():
            # the last value of a weight that hooks of torch.nn.utils compute anew each time
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                replaced[id(value)] = value.detach().clone()
    return copy.deepcopy(module, replaced)
