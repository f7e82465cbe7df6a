# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The config of an adapter that a command is asked about."""

import os

from ..config import PeftConfig
from ..utils.error import PeftPathError


def read_adapter_config(path: str) -> PeftConfig:
    """
    Read the config of an adapter.

    Args:
        path: its folder, or the file itself.

    Raises:
        PeftPathError: if there is none; nothing is looked up on a hub.
        PeftError: if it is not valid.
    """
    if os.path.isdir(path):
        return PeftConfig.from_pretrained(path)
    if not os.path.isfile(path):
        raise PeftPathError(f"there is no file {path!r}")
    return PeftConfig.from_file(path)
