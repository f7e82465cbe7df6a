# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The cases, one module per subject. A module in this folder is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from case import CASES


__all__ = ["CASES"]

for _module in sorted(info.name for info in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
