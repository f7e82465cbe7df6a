# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The registry of methods: each method's package enters itself, and is found by its folder."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .utils.error import PeftKeyError, PeftValueError
from .utils.near_names import did_you_mean, nearest
from .utils.peft_types import PeftType


if TYPE_CHECKING:
    import torch

    from .config import PeftConfig


@dataclass(frozen=True)
class Method:
    """One entry: classes are kept as `"module:name"` until they are needed, so that listing methods loads no torch."""

    config_cls: str | type
    model_cls: str | type | None
    prefix: str | None
    is_mixed_compatible: bool


_METHODS: dict[str, Method] = {}


def add_method(
    name: str,
    config_cls: str | type,
    model_cls: str | type | None,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Enter a method of this library; `peft.utils.register_peft_method` is for everybody else."""
    key = name.upper()
    for value in (config_cls, model_cls):
        if isinstance(value, str) and value.count(":") != 1:
            raise PeftValueError(f"{value!r} does not name a class; write 'package.module:Class'")
    if key in _METHODS:
        raise PeftValueError(f"a method named {key!r} is registered already; choose another name")
    _METHODS[key] = Method(config_cls, model_cls, f"{key.lower()}_" if prefix is None else prefix, is_mixed_compatible)


@lru_cache(maxsize=1)
def find_methods() -> None:
    """Import the package of every method once; their `__init__` enters them and loads nothing else."""
    from . import tuners

    for module in pkgutil.iter_modules(tuners.__path__):
        if module.ispkg:
            importlib.import_module(f"{tuners.__name__}.{module.name}")


def _resolve(value: str | type | None) -> Any:
    if not isinstance(value, str) or ":" not in value:  # a class, or the prefix of parameter names
        return value
    module, name = value.split(":")
    return getattr(importlib.import_module(module), name)


class _MethodTable(Mapping):
    """One column of the registry as a read-only mapping from `PeftType`."""

    def __init__(self, column: str):
        self._column = column

    def _rows(self) -> dict[str, Method]:
        find_methods()
        if self._column == "is_mixed_compatible":
            return {key: method for key, method in _METHODS.items() if method.is_mixed_compatible}
        return {key: method for key, method in _METHODS.items() if getattr(method, self._column) is not None}

    def __getitem__(self, key: str) -> Any:
        rows = self._rows()
        if key not in rows:
            name = getattr(key, "value", key)
            near = nearest(str(name).upper(), rows, most=1)
            raise PeftKeyError(f"no method named {name!r}; this version has {', '.join(rows)}{did_you_mean(near)}")
        column = "model_cls" if self._column == "is_mixed_compatible" else self._column
        return _resolve(getattr(rows[key], column))

    def __contains__(self, key: object) -> bool:
        return key in self._rows()

    def __iter__(self) -> Iterator[PeftType]:
        # names that the enum does not have belong to methods registered by users
        known = {member.value: member for member in PeftType}
        return iter([known.get(key, key) for key in self._rows()])

    def __len__(self) -> int:
        return len(self._rows())


PEFT_TYPE_TO_CONFIG_MAPPING = _MethodTable("config_cls")
PEFT_TYPE_TO_TUNER_MAPPING = _MethodTable("model_cls")
PEFT_TYPE_TO_PREFIX_MAPPING = _MethodTable("prefix")
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _MethodTable("is_mixed_compatible")


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
    tuner_cls(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return model
