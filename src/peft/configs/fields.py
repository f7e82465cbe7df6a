# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Fields of configs: how one is declared, and those that many configs share.

What a shared field starts with and what is said of it stands here once. A config says which of them it has, and where:
`target_modules: Names = shared_field("target_modules")`. Its place is that of the release, whose callers may give
values by position.
"""

from dataclasses import field
from typing import Any

from .environment import weight_tying_default


# names of modules: a list, a regular expression, or nothing
Names = list[str] | str | None
# indices of layers
Indices = list[int] | int | None

# field -> what it starts with, a function where each config gets its own; and what it is for
_SHARED: dict[str, tuple[Any, str]] = {
    "target_modules": (None, "Names of the modules to adapt (list), a regular expression, or 'all-linear'."),
    "exclude_modules": (None, "Modules to leave out: list or regular expression."),
    "modules_to_save": (None, "Names of modules that are trained and saved in full."),
    "layers_to_transform": (None, "Indices of the layers to adapt."),
    "layers_pattern": (None, "Name of the list of layers that the indices count."),
    "bias": ("none", "Biases of the base model to train: 'none', 'all', or those of adapted modules, 'METHOD_only'."),
    "fan_in_fan_out": (False, "Whether layers keep their weights as (in, out)."),
    "rank_pattern": (dict, "Name or regular expression -> rank, where it differs from r."),
    "alpha_pattern": (dict, "Name or regular expression -> alpha, where it differs."),
    "ensure_weight_tying": (weight_tying_default(), "Keep tied modules tied."),
}


def option(default: Any, text: str, **settings: Any) -> Any:
    """
    Declare a field of a config.

    Args:
        default: its value where the user gives none.
        text: what it is for, in a sentence; shown by tools that make command lines of configs.
        settings: others of `dataclasses.field`; its `metadata` are joined with the text.

    Returns:
        The field of a dataclass.

    Example:

        >>> from dataclasses import dataclass
        >>> from peft.configs.fields import option
        >>> @dataclass
        ... class Config:
        ...     block_size: int = option(4, "Features per block.")
        >>> Config().block_size
        4
    """
    metadata = {"help": text, **settings.pop("metadata", {})}
    return field(default=default, metadata=metadata, **settings)


def shared_field(name: str, **settings: Any) -> Any:
    """
    Declare a field that configs of many methods have.

    Args:
        name: its name, one of `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform`,
            `layers_pattern`, `bias`, `fan_in_fan_out`, `rank_pattern`, `alpha_pattern` and `ensure_weight_tying`.
        settings: as for `option`.

    Returns:
        The field of a dataclass.

    Raises:
        KeyError: for another name.

    Example:

        >>> from dataclasses import dataclass
        >>> from peft.configs.fields import Names, shared_field
        >>> @dataclass
        ... class Config:
        ...     target_modules: Names = shared_field("target_modules")
        >>> Config().target_modules is None
        True
    """
    default, text = _SHARED[name]
    if default is dict:
        return field(default_factory=dict, metadata={"help": text, **settings.pop("metadata", {})}, **settings)
    return option(default, text, **settings)
