# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The names of methods and tasks, and the table into which each method's package enters itself. No torch in here."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

from .utils.error import PeftKeyError, PeftValueError
from .utils.near_names import did_you_mean, nearest


class PeftType(str, Enum):
    """Method of an adapter, as written to `adapter_config.json` under `peft_type`."""

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class TaskType(str, Enum):
    """Task of the base model; picks the `PeftModel` subclass that wraps it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


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
    # found by the name of the folder: the registry knows no method, each method knows the registry
    folder = importlib.import_module(f"{__package__}.tuners")
    for module in pkgutil.iter_modules(folder.__path__):
        if module.ispkg:
            importlib.import_module(f"{folder.__name__}.{module.name}")


def register_peft_method(
    *, name: str, config_cls, model_cls, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """
    Enter a method into the package's registry.

    Args:
        name: name of the method; in upper case it is the value of `peft_type`.
        config_cls: config class, or `"package.module:Class"` to import it when it is first needed.
        model_cls: tuner class (a `BaseTuner`), or such a string.
        prefix: what the names of the method's parameters start with; `name` in lower case and `_` if left out.
        is_mixed_compatible: whether adapters of this method may be active beside those of other methods.

    Raises:
        PeftValueError: if the name is taken.

    Example:

        >>> from peft.utils import register_peft_method
        >>> register_peft_method(name="lora", config_cls="somewhere:Config", model_cls="somewhere:Model")
        Traceback (most recent call last):
        ...
        peft.utils.error.PeftValueError: a method named 'LORA' is registered already; choose another name
    """
    find_methods()  # so that a name that the library itself uses is refused
    add_method(name, config_cls, model_cls, prefix=prefix, is_mixed_compatible=is_mixed_compatible)


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


def config_of_method(cls: type) -> type | None:
    """
    Find the config that a method was entered with and that a class is, or derives from.

    Args:
        cls: a config class, such as a client's own that has further fields.
    """
    find_methods()
    entered = {method.config_cls for method in _METHODS.values()}
    return next((c for c in cls.__mro__ if c in entered or f"{c.__module__}:{c.__qualname__}" in entered), None)


PEFT_TYPE_TO_CONFIG_MAPPING = _MethodTable("config_cls")
PEFT_TYPE_TO_TUNER_MAPPING = _MethodTable("model_cls")
PEFT_TYPE_TO_PREFIX_MAPPING = _MethodTable("prefix")
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _MethodTable("is_mixed_compatible")
