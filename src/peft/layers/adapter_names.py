# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What can be the name of an adapter."""

from torch import nn

from ..utils.error import PeftKeyError
from ..utils.warning import warn


def check_adapter_name(name: str, prefix: str) -> None:
    """
    Refuse names that cannot be keys of module containers or folders of checkpoints.

    Args:
        name: name of an adapter.
        prefix: prefix of the method's parameter names.

    Raises:
        PeftKeyError: if it is empty, or holds a dot or a path separator.
    """
    if not isinstance(name, str) or not name:
        raise PeftKeyError(f"an adapter needs a name that is a non-empty string, found {name!r}")
    illegal = sorted({character for character in name if character in "./\\:\0" or ord(character) < 32})
    if illegal:
        raise PeftKeyError(
            f"adapter name {name!r} holds {', '.join(map(repr, illegal))}; names are keys of modules and names of "
            "folders, so leave out dots, colons, path separators and control characters"
        )
    if any(hasattr(container, name) for container in (nn.ModuleDict(), nn.ParameterDict())):
        raise PeftKeyError(f"adapter name {name!r} is an attribute of torch's module containers; choose another name")
    if prefix and prefix in name:
        warn(
            f"adapter name {name!r} holds {prefix!r}, which the names of the adapter's tensors start with; another "
            "name is safer for tools that read checkpoints by name"
        )
