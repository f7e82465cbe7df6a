# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""From a config to what its method makes of it: the config's own class, and adapter layers in a bare model."""

from typing import TYPE_CHECKING, Any

from .registry import (  # the tables, and the enum that is their key, have their public names here
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
)
from .utils.error import PeftKeyError, PeftValueError


if TYPE_CHECKING:
    import torch

    from .config import PeftConfig

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftType",
    "get_peft_config",
    "inject_adapter_in_model",
]


def get_peft_config(config_dict: dict[str, Any]) -> "PeftConfig":
    """
    Build a config from a dictionary such as `to_dict` gives.

    Args:
        config_dict: field values; `peft_type` picks the class.

    Raises:
        PeftKeyError: if `peft_type` is missing or unknown.

    Example:

        >>> from peft import get_peft_config
        >>> get_peft_config({"peft_type": "LORA", "r": 3}).r
        3
    """
    if "peft_type" not in config_dict:
        raise PeftKeyError(f"the dictionary has no peft_type; found {', '.join(sorted(config_dict)) or 'nothing'}")
    values = dict(config_dict)
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[values.pop("peft_type")]
    return config_cls(**values)


def inject_adapter_in_model(
    peft_config: "PeftConfig",
    model: "torch.nn.Module",
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, "torch.Tensor"] | None = None,
) -> "torch.nn.Module":
    """
    Put adapter layers into a model and return that model itself, without a `PeftModel` around it.

    Args:
        peft_config: what to inject; it is not changed.
        model: base model, changed in place; if anything is refused, it stays as it was.
        adapter_name: name of the adapter; one of the same name is removed from the model first.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be filled by loading a checkpoint.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted, whatever `peft_config`
            targets.

    Raises:
        PeftValueError: for a method that does not work by replacing modules, such as prompt learning.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), net)
        >>> sorted(name for name, _ in model.named_parameters())
        ['0.base_layer.bias', '0.base_layer.weight', '0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise PeftValueError(
            f"{peft_config.peft_type} does not put adapters into modules of the model; use get_peft_model instead"
        )
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
    if tuner_cls.uses_shared_state:
        raise PeftValueError(
            f"{peft_config.peft_type} keeps what its layers share beside the model; use get_peft_model instead"
        )
    tuner_cls(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return model
