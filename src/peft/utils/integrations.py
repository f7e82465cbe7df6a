# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What other libraries need done around parameters; each is imported where it is used."""

from collections.abc import Iterable, Iterator
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


def skip_init_on_device(func: Any) -> Any:
    """Mark a function so that accelerate's meta-device contexts do not reach into it."""
    func._skip_init_on_device = True
    return func


__getattr__ = old_names(__name__)
