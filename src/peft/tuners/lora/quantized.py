# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's layers on quantised linear layers, under the names that the released package has for each library."""

from typing import Any

from torch import nn

from ...anatomy.walking import unwrapped
from ...utils.error import PeftNotImplementedError
from ...utils.quantization_utils import resolve_quantization_backend
from ..families.quantized import dispatcher, layers_of_backends
from .config import LoraConfig
from .layer import Linear


class TorchaoLoraLinear(Linear):
    """LoRA on a linear layer whose weight torchao has quantised; see `Linear`."""

    def __init__(self, *args: Any, get_apply_tensor_subclass: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if get_apply_tensor_subclass is not None:
            self.quantization_backend = resolve_quantization_backend(
                self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
            )


class TeLinear(Linear):
    """LoRA on a linear layer of Transformer Engine, which merges nothing; see `Linear`."""

    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse to merge: the library keeps its weight in forms of its own.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError(
            "nothing can be merged into layers of Transformer Engine, which keep their weight in forms of their own; "
            "keep the adapter unmerged, or merge it into the same model with layers of torch"
        )


_NAMES = {
    "bnb 8bit": "Linear8bitLt",
    "bnb 4bit": "Linear4bit",
    "aqlm": "AqlmLoraLinear",
    "awq": "AwqLoraLinear",
    "eetq": "EetqLoraLinear",
    "gptq": "GPTQLoraLinear",
    "hqq": "HqqLoraLinear",
    "inc": "IncLoraLinear",
}

# name of a backend -> LoRA's layer for it, and a function `dispatch_...` for each
LAYER_OF_BACKEND = layers_of_backends(Linear, _NAMES, globals()) | {"torchao": TorchaoLoraLinear}
for _backend, _layer_cls in LAYER_OF_BACKEND.items():
    _dispatch = dispatcher(_backend, _layer_cls)
    globals()[_dispatch.__name__] = _dispatch


def dispatch_transformer_engine(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """
    Make the LoRA layer for a linear layer of Transformer Engine.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    kind = type(unwrapped(target))
    is_of_library = kind.__module__.partition(".")[0] == "transformer_engine" and kind.__name__ == "Linear"
    return TeLinear(target, adapter_name, config=config, **kwargs) if is_of_library else None
