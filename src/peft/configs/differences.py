# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""In which fields two configs describe different adapters."""

from enum import Enum
from typing import Any

from ..utils.wrapped_names import with_plain_names


# where an adapter is from, and what a run does with it; none of them says what it computes
_FIELDS_OF_ORIGIN = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)


def config_differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """
    Find the fields in which two configs describe different adapters.

    Args:
        one: a config.
        other: another one.

    Returns:
        Field name -> value in each of the two. Of two methods, the method alone.

    Example:

        >>> from peft import LoraConfig
        >>> from peft.configs.differences import config_differences
        >>> config_differences(LoraConfig(lora_alpha=16), LoraConfig(inference_mode=True))
        {'lora_alpha': (16, 8)}
    """
    if one.peft_type != other.peft_type:
        return {"peft_type": (_plain(one.peft_type), _plain(other.peft_type))}
    values = one.to_dict(), other.to_dict()
    names = [name for name in {**values[0], **values[1]} if name not in _FIELDS_OF_ORIGIN]
    pairs = {name: tuple(_plain(fields.get(name)) for fields in values) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    """Bring values that mean the same to one form: names in any order, and nothing that was left out or is empty."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(content) for key, content in with_plain_names(value).items()} or None
    if isinstance(value, (list, tuple, set, frozenset)):
        names = with_plain_names(value)
        return (sorted(names) if all(isinstance(name, str) for name in names) else list(names)) or None
    return with_plain_names(value)
