# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What other libraries need done around parameters; each is imported where it is used."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .old_names import old_names
from .quantization_utils import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type


__all__ = [
    "changes_weights_while_loading",
    "check_deepspeed_zero3_enabled",
    "dequantize_bnb_weight",
    "dequantize_module_weight",
    "gather_params_ctx",
    "get_bnb_param_type",
    "init_empty_weights",
    "skip_init_on_device",
]


# what accelerate replaces to make modules without storage
_REGISTERING = {name: getattr(nn.Module, name) for name in ("register_parameter", "register_buffer")}


def changes_weights_while_loading() -> bool:
    """Say whether this version of transformers lays weights of checkpoints out anew; version 5 does."""
    return find_spec("transformers.core_model_loading") is not None


def check_deepspeed_zero3_enabled() -> bool:
    """Say whether DeepSpeed partitions parameters over processes (ZeRO stage 3) in this run."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int = 0, fwd_module: nn.Module | None = None
) -> AbstractContextManager:
    """
    Hold partitioned parameters whole inside a context; does nothing where parameters are not partitioned.

    Args:
        param: one parameter or several.
        modifier_rank: process whose changes are kept afterwards.
        fwd_module: module whose forward pass uses them.
    """
    if not check_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    params = [param] if isinstance(param, torch.Tensor) else list(param)
    return deepspeed.zero.GatheredParameters(params, modifier_rank=modifier_rank, fwd_module=fwd_module)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """
    Build modules without storage for their parameters.

    Args:
        include_buffers: do the same for buffers.
    """
    import accelerate

    with accelerate.init_empty_weights(include_buffers=bool(include_buffers)):
        yield


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let `init_empty_weights`, and accelerate's context of that name, not reach into a function.

    Args:
        func: what makes modules that have storage wherever it is called.

    Example:

        >>> from torch import nn
        >>> from peft.utils.integrations import init_empty_weights, skip_init_on_device
        >>> make = skip_init_on_device(lambda: nn.Linear(2, 2))
        >>> with init_empty_weights():
        ...     str(make().weight.device), str(nn.Linear(2, 2).weight.device)
        ('cpu', 'meta')
    """

    @functools.wraps(func)
    def with_storage(*args: Any, **kwargs: Any) -> Any:
        present = {name: getattr(nn.Module, name) for name in _REGISTERING}
        try:
            for name, method in _REGISTERING.items():
                setattr(nn.Module, name, method)
            return func(*args, **kwargs)
        finally:
            for name, method in present.items():
                setattr(nn.Module, name, method)

    with_storage._skip_init_on_device = True
    return with_storage


__getattr__ = old_names(__name__)
