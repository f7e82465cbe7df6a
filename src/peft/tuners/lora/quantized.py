# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA's layers on quantised linear layers, under the names that the released package has for each library.

They all compute as `Linear` does, which asks the registry of backends where it needs the weight. Each has a class of
its own so that it can be told, and replaced, by itself.
"""

from typing import Any

from torch import nn

from ...anatomy.walking import unwrapped
from ...utils.error import PeftNotImplementedError
from ...utils.quantization_utils import resolve_quantization_backend
from .config import LoraConfig
from .layer import Linear


class Linear8bitLt(Linear):
    """LoRA on a linear layer that bitsandbytes has quantised to 8 bits; see `Linear`."""


class Linear4bit(Linear):
    """LoRA on a linear layer that bitsandbytes has quantised to 4 bits; see `Linear`."""


class AqlmLoraLinear(Linear):
    """LoRA on a linear layer of AQLM; see `Linear`."""


class AwqLoraLinear(Linear):
    """LoRA on a linear layer that AWQ has quantised; see `Linear`."""


class EetqLoraLinear(Linear):
    """LoRA on a linear layer of EETQ; see `Linear`."""


class GPTQLoraLinear(Linear):
    """LoRA on a linear layer that GPTQ has quantised; see `Linear`."""


class HqqLoraLinear(Linear):
    """LoRA on a linear layer of HQQ; see `Linear`."""


class IncLoraLinear(Linear):
    """LoRA on a linear layer of Intel's Neural Compressor; see `Linear`."""


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


# name of a backend -> LoRA's layer for it
LAYER_OF_BACKEND: dict[str, type[Linear]] = {
    "bnb 8bit": Linear8bitLt,
    "bnb 4bit": Linear4bit,
    "aqlm": AqlmLoraLinear,
    "awq": AwqLoraLinear,
    "eetq": EetqLoraLinear,
    "gptq": GPTQLoraLinear,
    "hqq": HqqLoraLinear,
    "inc": IncLoraLinear,
    "torchao": TorchaoLoraLinear,
}


def _dispatch(
    backend: str, target: nn.Module, adapter_name: str, config: LoraConfig, arguments: dict[str, Any]
) -> nn.Module | None:
    found = resolve_quantization_backend(unwrapped(target))
    if found is None or found.name != backend:
        return None
    return LAYER_OF_BACKEND[backend](target, adapter_name, config=config, **arguments)


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer that bitsandbytes has quantised to 8 bits.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("bnb 8bit", target, adapter_name, config, kwargs)


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer that bitsandbytes has quantised to 4 bits.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("bnb 4bit", target, adapter_name, config, kwargs)


def dispatch_aqlm(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer of AQLM.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("aqlm", target, adapter_name, config, kwargs)


def dispatch_awq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer that AWQ has quantised.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("awq", target, adapter_name, config, kwargs)


def dispatch_eetq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer of EETQ.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("eetq", target, adapter_name, config, kwargs)


def dispatch_gptq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer that GPTQ has quantised.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("gptq", target, adapter_name, config, kwargs)


def dispatch_hqq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer of HQQ.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("hqq", target, adapter_name, config, kwargs)


def dispatch_inc(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer of Intel's Neural Compressor.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("inc", target, adapter_name, config, kwargs)


def dispatch_torchao(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a layer that torchao has quantised.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    return _dispatch("torchao", target, adapter_name, config, kwargs)


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
