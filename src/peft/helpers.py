# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Small helpers around models with adapters: contexts for their layers, and what is at home in other rooms."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .anatomy.condition_numbers import KappaTuneSelector, find_kappa_target_modules
from .config import PeftConfig
from .layers.base_layer import BaseTunerLayer
from .layers.merging.changes import taken_out
from .models.peft_model import PeftModel
from .models.signatures import update_forward_signature, update_generate_signature, update_signature
from .tuners.lora.layer import LoraLayer
from .tuners.lora.model import LoraModel
from .tuners.lora.variants import dora
from .utils.error import PeftError, PeftTypeError, PeftValueError
from .utils.old_names import old_names


__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "PeftModel",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """
    Say whether an adapter is to be found in a folder or on the hub.

    Args:
        model_name_or_path: folder, or hub id.

    Example:

        >>> from peft.helpers import check_if_peft_model
        >>> check_if_peft_model("/no/such/folder")
        False
    """
    try:
        PeftConfig.from_pretrained(os.fspath(model_name_or_path))
    except (PeftError, OSError, ValueError, KeyError, TypeError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """
    Multiply the scaling of all LoRA adapters inside a context.

    Args:
        model: a model with LoRA layers; adapters that are merged are merged anew.
        multiplier: factor; 0 switches the adapters off, values between let them take part.

    Raises:
        PeftTypeError: if the factor is not a number.
        PeftValueError: if the model has no LoRA layer.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.helpers import rescale_adapter_scale
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
        >>> with rescale_adapter_scale(model, 0.5):
        ...     print(net[0].scaling["default"])
        0.5
        >>> net[0].scaling["default"]
        1.0
    """
    if not isinstance(multiplier, (int, float)):
        raise PeftTypeError(f"multiplier must be a number, found {type(multiplier).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise PeftValueError("the model has no LoRA layer whose scaling could be changed")
    # in tied layers the scaling is the owner's, which is among the layers too; what stands in the table is their own
    before = [layer.scaling for layer in layers]
    with _merged_taken_out(layers):
        for layer, scaling in zip(layers, before, strict=True):
            # another table: whoever has looked at the one before may compare it with what follows
            layer.scaling = copy.copy(scaling)
            layer.scaling.update({name: value * multiplier for name, value in scaling.items()})
    try:
        yield
    finally:
        with _merged_taken_out(layers):
            for layer, scaling in zip(layers, before, strict=True):
                # adapters may have come and gone meanwhile
                now = dict(layer.scaling)
                for name in set(scaling) - set(now):
                    del scaling[name]
                scaling.update({name: value for name, value in now.items() if name not in scaling})
                layer.scaling = scaling


@contextmanager
def _merged_taken_out(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in {name: None for layer in layers for name in layer.merged_adapters}:
            stack.enter_context(taken_out(layers, name))
        yield


class DoraCaching:
    """
    Says whether DoRA's layers keep the norms of their weights while a model is in eval mode.

    They do not by default. Where they do, a norm is kept for as long as base weight, factors and scaling stay as they
    are, and takes one number per output feature. Writes through `.data` are the exception: torch does not count them,
    so who keeps norms must not write like that. In a context the setting holds until its end; a call changes it for
    good. Nothing is kept beyond the change of a setting.

    Args:
        enabled: False to compute norms in each forward pass.

    Example:

        >>> from peft.helpers import DoraCaching
        >>> from peft.tuners.lora import dora
        >>> with DoraCaching():
        ...     dora.ENABLE_DORA_CACHING
        True
        >>> dora.ENABLE_DORA_CACHING
        False
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(dora.ENABLE_DORA_CACHING)
        dora.switch_caching(self.enabled)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        dora.switch_caching(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        """
        Change the setting until it is changed again.

        Args:
            enabled: whether norms are kept.
        """
        dora.switch_caching(enabled)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """
    Let adapter layers take their inputs as they come inside a context, instead of casting them to their own type.

    It is meant for models that cast layer by layer, as diffusers' layerwise casting does.

    Args:
        model: a model with adapter layers.
        active: False to do nothing.
    """
    layers = [
        module
        for module in model.modules()
        if active and isinstance(module, BaseTunerLayer) and hasattr(module, "cast_input_dtype_enabled")
    ]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


class MontecloraTrainerMixin:
    """
    Adds the regulariser of MonteCLoRA to the loss of a trainer; to be put before the class of the trainer.

    Example:

        >>> from peft.helpers import MontecloraTrainerMixin
        >>> class PlainTrainer:
        ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ...         return model(inputs).sum()
        >>> class MyTrainer(MontecloraTrainerMixin, PlainTrainer):
        ...     pass
    """

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """
        Compute the trainer's loss, with what MonteCLoRA adds to it; the mean, if there are several models with LoRA.

        Args:
            model: the model that is trained, wrapped or not.
            inputs: a batch.
            return_outputs: give the outputs of the model too.
            kwargs: for the trainer.

        Returns:
            The loss, or loss and outputs.
        """
        computed = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        added = [tuner._get_monteclora_loss() for tuner in model.modules() if isinstance(tuner, LoraModel)]
        penalty = sum(added) / max(1, len(added))
        return (computed[0] + penalty, *computed[1:]) if return_outputs else computed + penalty


__getattr__ = old_names(__name__)
