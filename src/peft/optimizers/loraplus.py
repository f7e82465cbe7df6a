# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA+: factor B learns faster than factor A.

Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

from ..utils.error import PeftTypeError
from ..utils.old_names import old_names
from ..utils.warning import warn
from .parameters import check_setting, trainable_parameters


# optimisers of bitsandbytes with states in 8 bits, which are too coarse for embeddings
_IN_8_BITS = {"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"}


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """
    Make an optimiser in which the B factors of LoRA have a greater learning rate than the rest.

    Groups of parameters, in this order, the first four even if they are empty:

    1. what is in none of the others, such as A factors: `lr`;
    2. factors of embeddings: `loraplus_lr_embedding`;
    3. B factors, and what else LoRA has of one dimension, such as DoRA's magnitudes: `lr * loraplus_lr_ratio`;
    4. those of them that do not decay, such as the biases of B factors: the same rate;
    5. only if there are any: parameters of one dimension outside of LoRA, such as biases and norms of modules that are
       trained in full, which do not decay: `lr`.

    A tensor that several modules have in common is there once.

    Args:
        model: a model with LoRA.
        optimizer_cls: class of the optimiser, or a function that takes what such a class does.
        lr: learning rate.
        loraplus_lr_ratio: how many times as fast B factors learn; the paper recommends about 16, and more for
            harder tasks.
        kwargs: `loraplus_weight_decay` (0.0), `loraplus_lr_embedding` (1e-6); everything else is for
            `optimizer_cls`.

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        PeftTypeError: if `optimizer_cls` makes nothing.
        PeftValueError: if a rate is no number or negative, or nothing is trained.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_loraplus_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(1, 0.0001), (0, 1e-06), (1, 0.0016), (0, 0.0016)]
    """
    if not callable(optimizer_cls):
        raise PeftTypeError(f"optimizer_cls must be a class of optimisers, found {optimizer_cls!r}")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_weight_decay": decay,
        "loraplus_lr_embedding": lr_embedding,
    }.items():
        check_setting(name, value)
    groups = [
        {"params": [], "lr": rate, "weight_decay": weight_decay}
        for rate, weight_decay in (
            (lr, decay),
            (lr_embedding, decay),
            (lr * loraplus_lr_ratio, decay),
            (lr * loraplus_lr_ratio, 0.0),
            (lr, 0.0),
        )
    ]
    for parameter, place in _places(model):
        groups[place]["params"].append(parameter)
    if not groups[2]["params"]:
        warn(
            f"loraplus_lr_ratio={loraplus_lr_ratio} has no effect: no factor B of LoRA is trained in this "
            f"{type(model).__name__}"
        )
    if not groups[4]["params"]:
        del groups[4]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    if getattr(optimizer_cls, "__name__", "") in _IN_8_BITS:
        _keep_embeddings_precise(model)
    return optimizer


def _places(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield what is trained, each with the index of its group."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, tuple(ALL_LAYERNORM_LAYERS))
        for parameter in module.parameters()
    }
    for name, parameter in trainable_parameters(model).items():
        parts = name.split(".")
        # ZeRO-3 replaces partitioned parameters by empty ones and keeps the shape in ds_shape
        is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) == 1
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            yield parameter, 1
        elif "lora_B" in parts or (is_vector and any(part.startswith("lora_") for part in parts)):
            yield parameter, 3 if parts[-1] == "bias" else 2
        else:
            yield parameter, 4 if is_vector or id(parameter) in norms else 0


def _keep_embeddings_precise(model: nn.Module) -> None:
    """Have bitsandbytes keep the states of embeddings that are trained in 32 bits."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})


__getattr__ = old_names(__name__)
