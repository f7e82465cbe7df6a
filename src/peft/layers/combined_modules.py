# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The modules that are trained in full, of an adapter that is made of several: those of one of them."""

from collections.abc import Sequence

from torch import nn

from ..anatomy.walking import adapter_modules
from ..utils.error import PeftValueError
from ..utils.wrapped_names import plain_name, renamed
from .modules_to_save import ModulesToSaveWrapper


def source_of_saved_modules(model: nn.Module, adapters: Sequence[str]) -> str | None:
    """
    Find the adapter whose modules trained in full a combination gets a copy of.

    Args:
        model: the base model, with adapters in it.
        adapters: names of the adapters.

    Returns:
        Name; None if no adapter trains modules in full.

    Raises:
        PeftValueError: if several do.
    """
    sources: set[str] = set()
    for name, module in adapter_modules(model):
        if isinstance(module, ModulesToSaveWrapper):
            found = [adapter for adapter in adapters if adapter in module.available_adapters]
            sources.update(found)
            if len(sources) > 1:
                raise PeftValueError(
                    f"adapters {', '.join(sorted(sources))} train modules in full ({name!r} is one of them), and "
                    "those cannot be combined; at most one adapter may have modules_to_save"
                )
    return next(iter(sources), None)


def copy_saved_modules(model: nn.Module, source: str, target: str) -> None:
    """
    Copy what one adapter has trained in full.

    Args:
        model: the base model, with adapters in it.
        source: name of that adapter.
        target: name of the one that gets its values.
    """
    tensors = renamed(model.state_dict(), plain_name)
    for name, module in adapter_modules(model):
        if isinstance(module, ModulesToSaveWrapper) and target in module.available_adapters:
            places = dict(module.adapter_keys(source))
            for saved, live in module.adapter_keys(target):
                tensors[plain_name(f"{name}.{live}")].copy_(tensors[plain_name(f"{name}.{places[saved]}")])
