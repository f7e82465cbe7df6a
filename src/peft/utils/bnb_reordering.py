# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Weights of 4 bits that bitsandbytes reorders for the processor.

On a processor with AVX512-BF16, a `Linear4bit` on the CPU reorders its codes in the first forward pass that needs no
gradients, and rounds their scales to bfloat16. The kernel for that order records no gradients, and the layer stays
with it: after an evaluation, training would go on without the gradients that ought to pass through the layer. What
bitsandbytes puts back when the layer is saved has other scales than before, and without nested quantisation they are
in another order than they are read in.

Hooks on these layers keep what there was before, and put it back where gradients are needed and before saving.
"""

import copy
from typing import Any

import torch
from torch import nn


# attribute of a quantisation state: what it was before the codes were reordered
_BEFORE = "_before_reordering"


def may_reorder(layer: nn.Module) -> bool:
    """
    Say whether a layer is one that may reorder its codes.

    Args:
        layer: a layer of bitsandbytes.
    """
    return getattr(layer, "support_avx512bf16_for_cpu", False) and layer.weight.device.type == "cpu"


def watch_order(layer: nn.Module) -> None:
    """
    Let a layer pass gradients on and be saved as it was quantised, whatever it computes with in between.

    Args:
        layer: a layer that may reorder its codes.
    """
    if _before_forward not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_before_forward)
        layer.register_state_dict_pre_hook(_before_saving)


def leave_order(layer: nn.Module) -> None:
    """
    Take back what `watch_order` did to a layer, and what the layer did since.

    Args:
        layer: any layer of bitsandbytes.
    """
    if _before_forward in layer._forward_pre_hooks.values():
        _put_back(layer.weight)
    for hooks, own in ((layer._forward_pre_hooks, _before_forward), (layer._state_dict_pre_hooks, _before_saving)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]


def in_first_order(weight: nn.Parameter) -> tuple[torch.Tensor, Any]:
    """
    Give the codes of a weight in the order in which they were quantised; the weight stays as it is.

    Args:
        weight: a parameter of bitsandbytes with 4 bits.

    Returns:
        The codes and what is to be known about them. If the weight was reordered without `watch_order`, its scales are
        those that it computes with, which are rounded to bfloat16.
    """
    state = weight.quant_state
    if not _is_reordered(state):
        return weight.data, state
    from bitsandbytes import functional

    plain = copy.copy(state)
    plain.original_nested = False  # the scales are put back below
    codes, plain = functional._convert_weight_packed_for_cpu_inverse(weight.data, plain)
    if hasattr(state, _BEFORE):
        return codes, copy.copy(getattr(state, _BEFORE))
    plain.absmax = plain.absmax.T.reshape(-1).float()
    return codes, plain


def _is_reordered(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _put_back(weight: nn.Parameter) -> None:
    """Reorder codes as they were; the state stays the same object, since layers hold it too."""
    if _is_reordered(getattr(weight, "quant_state", None)):
        weight.data, before = in_first_order(weight)
        weight.quant_state.__dict__.clear()
        weight.quant_state.__dict__.update(before.__dict__)


def _before_forward(layer: nn.Module, args: tuple) -> None:
    """Put codes back in calls for which they are not reordered; note how they are before the layer may do so."""
    state = getattr(layer.weight, "quant_state", None)
    if _is_reordered(state):
        if layer.training or (args and args[0].requires_grad):
            _put_back(layer.weight)
    elif state is not None and not hasattr(state, _BEFORE):
        setattr(state, _BEFORE, copy.copy(state))


def _before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Put codes back before they are saved."""
    _put_back(layer.weight)
