# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How FSDP divides a model with adapters."""

import os
from collections import Counter
from collections.abc import Callable

from torch import nn

from .error import PeftValueError
from .same_tensor import identity_of


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[[nn.Module, bool, int], bool]:
    """
    Give a policy for FSDP that keeps frozen and trained parameters, and the members of a tie, together.

    FSDP makes one flat parameter of each unit, all of which is trained or none. So the units are the model's blocks,
    and inside them each layer without children whose weight is trained, such as `lora_A`. A layer that shares its
    parameters with another one stays in the unit around both: units of their own would hold them twice.

    Args:
        model: the model with adapters. Its blocks are the classes named in the environment variable
            `FSDP_TRANSFORMER_CLS_TO_WRAP`, with commas between them, or else those in `_no_split_modules`.

    Returns:
        What FSDP takes as `auto_wrap_policy`.

    Raises:
        PeftValueError: if the environment variable names a class that the model does not have.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.utils.other import fsdp_auto_wrap_policy
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> policy = fsdp_auto_wrap_policy(model)
        >>> [name for name, module in model.named_modules() if policy(module, False, 0)]
        ['base_model.model.0.lora_A.default', 'base_model.model.0.lora_B.default']
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    blocks = {name.strip() for name in named.split(",")} if named else set(_blocks_of(model))
    present = {type(module).__name__ for module in model.modules()}
    if named and not blocks <= present:
        raise PeftValueError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP names {', '.join(sorted(blocks - present))}, which the model does not "
            f"have; its blocks are {', '.join(sorted(_blocks_of(model))) or 'unknown'}"
        )
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    holders = Counter(identity_of(parameter) for parameter in held if parameter is not None)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or type(module).__name__ in blocks or _is_trained_leaf(module, holders)

    return policy


def _blocks_of(model: nn.Module) -> set[str]:
    """Collect the class names that transformers' models give as those that are not to be split."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _is_trained_leaf(module: nn.Module, holders: Counter) -> bool:
    weight = module._parameters.get("weight")
    return not module._modules and weight is not None and weight.requires_grad and holders[identity_of(weight)] == 1
