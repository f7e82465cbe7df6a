# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Layers on quantised linear layers, under the names that the released package has for each library.

They all compute as a method's layer for linear layers does, which asks the registry of backends where it needs the
weight. Each has a class of its own so that it can be told, and replaced, by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...anatomy.walking import unwrapped
from ...layers.base_layer import BaseTunerLayer
from ...utils.quantization_utils import resolve_quantization_backend


# name of a backend -> what it stands for
_LIBRARIES = {
    "bnb 8bit": "that bitsandbytes has quantised to 8 bits",
    "bnb 4bit": "that bitsandbytes has quantised to 4 bits",
    "aqlm": "of AQLM",
    "awq": "that AWQ has quantised",
    "eetq": "of EETQ",
    "gptq": "that GPTQ has quantised",
    "hqq": "of HQQ",
    "inc": "of Intel's Neural Compressor",
    "torchao": "whose weight torchao has quantised",
}


def layers_of_backends(
    linear: type[BaseTunerLayer], names: Mapping[str, str], module: dict[str, Any]
) -> dict[str, type[BaseTunerLayer]]:
    """
    Make a method's layers for quantised linear layers.

    Args:
        linear: its layer for linear layers.
        names: name of a backend -> name of the class.
        module: globals of the module that the classes are to stand in.

    Returns:
        Name of a backend -> class.
    """
    classes = {}
    for backend, name in names.items():
        doc = f"{linear.__name__} on a linear layer {_LIBRARIES[backend]}; see `{linear.__name__}`."
        namespace = {"__doc__": doc, "__module__": module["__name__"], "__qualname__": name}
        classes[backend] = module[name] = type(linear)(name, (linear,), namespace)
    return classes


def dispatcher(backend: str, layer_cls: type[BaseTunerLayer]) -> Callable[..., nn.Module | None]:
    """
    Make a function that adapts the layers of one backend, as the released package has one for each.

    Args:
        backend: its name.
        layer_cls: layer for it.
    """

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        found = resolve_quantization_backend(unwrapped(target))
        is_of_backend = found is not None and found.name == backend
        return layer_cls(target, adapter_name, config=config, **kwargs) if is_of_backend else None

    dispatch.__name__ = dispatch.__qualname__ = f"dispatch_{backend.replace(' ', '_')}"
    dispatch.__doc__ = f"""
    Make the layer for a linear layer {_LIBRARIES[backend]}.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return dispatch
