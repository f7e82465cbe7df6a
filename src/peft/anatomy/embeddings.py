# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Asking a model which its embeddings are: many have no such methods, or methods that refuse to answer."""

import torch
from torch import nn

from ..utils.wrapped_names import WRAPPED
from .walking import is_adapter_module


def input_embedding(model: nn.Module) -> nn.Module | None:
    """
    Give what a model calls its input embedding; None if it has none, or does not say.

    Args:
        model: any model, with or without adapters.
    """
    return _asked(model, "get_input_embeddings")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """
    Give what a model calls its output embedding, its head; None if it has none, or does not say.

    Args:
        model: any model, with or without adapters.
    """
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):  # models without a text input, or without a head
        return None
    return module if isinstance(module, nn.Module) else None


def without_adapters_around(module: nn.Module | None) -> nn.Module | None:
    """
    Give the module of the base model below adapter modules, and below what torch.compile or FSDP has put around it.

    Args:
        module: a module, or None.
    """
    while module is not None:
        inner = module._base_names[:1] if is_adapter_module(module) else tuple(WRAPPED & module._modules.keys())
        if not inner:
            break
        module = module._modules[inner[0]]
    return module


def let_output_require_grad(module: nn.Module) -> None:
    """
    Let gradients flow through the output of a frozen module, without which checkpointed layers would get none.

    Args:
        module: such as an embedding.
    """
    module.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    # with a name of its own, since models with hooks are pickled
    output.requires_grad_(True)


def checkpoints_activations(model: nn.Module) -> bool:
    """
    Say whether a model computes its activations anew in the backward pass, and so uses no cache in training.

    Args:
        model: any model.
    """
    # transformers 5 has renamed the property; each is read once, since it asks every module of the model
    found = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if found is None else found)
