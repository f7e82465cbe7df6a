# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Calls of a model in which each sample of the batch has an adapter of its own."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from ..anatomy.walking import adapter_modules
from ..layers.base_layer import BaseTunerLayer
from ..layers.call_context import Call, calling
from ..utils.error import PeftTypeError, PeftValueError
from ..utils.near_names import explain_unknown_adapters
from .wrapper import ModelWrapper


def adapter_per_sample(
    model: ModelWrapper, adapter_names: Sequence[str] | None, copies: bool = False
) -> AbstractContextManager[Call]:
    """
    Begin a call in which each sample of the batch has an adapter of its own.

    Args:
        model: the model that is called.
        adapter_names: one name per sample, `"__base__"` for none; None for the active adapters, whatever a call around
            this one says.
        copies: whether samples may come several times in a row, as with beams.

    Returns:
        A context in which the layers of the model know their adapters.

    Raises:
        PeftTypeError: if the model has layers that cannot do that.
        PeftValueError: for an unknown name, or if the model cannot do that as it is.
    """
    if adapter_names is None:
        return calling(adapter_names=None, modules=())
    if "prompt_encoder" in model._modules:
        raise PeftValueError("adapter_names does not work with prompt learning: one prompt is used at a time")
    modules = [module for _, module in adapter_modules(model)]
    _check(model, adapter_names, modules)
    return calling(adapter_names=list(adapter_names), modules=frozenset(map(id, modules)), repeats=copies)


def _check(model: ModelWrapper, adapter_names: Sequence[str], modules: list[nn.Module]) -> None:
    unknown = sorted(set(adapter_names) - set(model.peft_config) - {"__base__"})
    if unknown:
        raise PeftValueError(
            "adapter_names takes names of adapters, and '__base__' for none: "
            f"{explain_unknown_adapters(unknown, model.peft_config)}"
        )
    if model.training:
        raise PeftValueError("adapter_names works for inference only; call eval() first")
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    whole = [module for module in modules if not getattr(module, "supports_mixed_batch", True)]
    if whole:
        raise PeftTypeError(
            f"adapter_names does not work on {type(whole[0]).__name__}, whose adapters change one weight for all "
            "samples; give each adapter a batch of its own"
        )
    if any(layer.merged for layer in layers):
        raise PeftValueError("adapter_names does not work while adapters are merged; call unmerge_adapter() first")
