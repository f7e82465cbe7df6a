# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Asking a model which its embeddings are: many have no such methods, or methods that refuse to answer."""

import torch
from torch import nn

from ..utils.wrapped_names import WRAPPED
from .walking import find_parameter_name_by_module, is_adapter_module, walk


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


def embedding_of_vocabulary(model: nn.Module, rows: int) -> nn.Module | None:
    """
    Find the module that holds a vector for each token of a vocabulary, in a model that does not say which it is.

    Args:
        model: any model, with or without adapters.
        rows: size of the vocabulary.

    Returns:
        The first embedding of that size, else the first module of any other kind with such a weight; None if there is
        none.
    """
    found = []
    for _, module in walk(model):
        base = without_adapters_around(module)
        weight = base._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and len(weight) == rows:
            found.append((not isinstance(base, nn.Embedding), module))
    return min(found, key=lambda item: item[0])[1] if found else None


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


# ------------------------------------------------------------ names of embeddings, as the released package asks them
def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """
    Give the full name of a model's input embedding.

    Args:
        model: any model.
        default: what to give if it has none, or does not say.
    """
    embedding = input_embedding(model)
    return default if embedding is None else find_parameter_name_by_module(model, embedding)


def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """
    Say whether a layer adapts an embedding or an output head.

    Args:
        layer: any module.
    """
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """
    Give the full name of an embedding, or of the base layer inside one that is adapted.

    Args:
        model: a model.
        layer: a part of it.
        is_embedding_in_target_modules: give the name of the base layer.

    Returns:
        The name; None if there is no such module.
    """
    wanted = getattr(layer, "base_layer", None) if is_embedding_in_target_modules else layer
    return None if wanted is None else find_parameter_name_by_module(model, wanted) or None
