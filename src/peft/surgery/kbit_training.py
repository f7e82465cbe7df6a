# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Making a quantised base model ready for the training of adapters."""

from typing import Any

import torch
from torch import nn

from ..anatomy.embeddings import input_embedding, let_output_require_grad
from ..utils.quantization_utils import get_bnb_param_type, resolve_quantization_backend


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """
    Make a quantised base model ready for training: freeze it, stabilise what is not quantised, save memory.

    Parameters in half precision that are not quantised, such as normalisation and embeddings, become float32. They do
    so in their places, so what is tied stays tied. Where quantised layers take inputs of one type only, which holds
    for all libraries but bitsandbytes, parameters keep their types. Gradient checkpointing is for quantised models; a
    model that is not quantised is frozen and brought to float32, and nothing else.

    Args:
        model: the base model; it is changed in place.
        use_gradient_checkpointing: compute activations anew in the backward pass instead of keeping them. Embeddings
            then give outputs that require gradients, without which nothing would reach the adapters.
        gradient_checkpointing_kwargs: passed on to the model, such as `{"use_reentrant": False}`.
        auto_clear_cache: give memory that the change of types has set free back to the accelerator.

    Returns:
        The same model.

    Example:

        >>> import torch
        >>> from peft import prepare_model_for_kbit_training
        >>> model = prepare_model_for_kbit_training(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
        >>> model.weight.dtype, model.weight.requires_grad
        (torch.float32, False)
    """
    backends = [backend for module in model.modules() if (backend := resolve_quantization_backend(module))]
    is_quantized = bool(backends) or getattr(model, "is_quantized", False)
    model.requires_grad_(False)
    if all(backend.casts_inputs for backend in backends) and (backends or not is_quantized):
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and not get_bnb_param_type(parameter):
                parameter.data = parameter.data.float()
    if auto_clear_cache and hasattr(torch, "accelerator") and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if is_quantized and use_gradient_checkpointing:
        _checkpoint_gradients(model, gradient_checkpointing_kwargs)
    return model


def _checkpoint_gradients(model: nn.Module, options: dict[str, Any] | None) -> None:
    """Switch gradient checkpointing on, in a model of which no parameter requires gradients."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif (embedding := input_embedding(model)) is not None:
        let_output_require_grad(embedding)
    # transformers has given it another name
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable(options) if options else enable()
