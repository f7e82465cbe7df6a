# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Names that are resolved when they are first used, so that importing a package stays cheap."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import filter as matching
from typing import Any

from .old_names import find_old_name


def lazy_exports(
    package: str, exports: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Build `__getattr__`, `__dir__` and `__all__` of a package or module whose names live elsewhere (PEP 562).

    Submodules of the package resolve as attributes as well, so `peft.tuners.lora.layer` works after `import peft`.

    Args:
        package: `__name__` of the package or module.
        exports: module path (absolute, or relative with a leading dot) -> names that it provides. A name with a star
            stands for all that the module lists; that module is imported at once.

    Returns:
        The two functions and the list, to be assigned in it.
    """
    home = {name: module for module, names in exports.items() for name in _listed(package, module, names)}

    def __getattr__(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(home[name], package), name)
            setattr(sys.modules[package], name, value)
            return value
        is_package = "__path__" in vars(sys.modules[package])
        if is_package and not name.startswith("__") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        return find_old_name(package, name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return __getattr__, __dir__, sorted(home)


def _listed(package: str, module: str, names: Iterable[str]) -> Iterable[str]:
    """Put names of a module in the place of those with a star."""
    for name in names:
        yield from matching(dir(importlib.import_module(module, package)), name) if "*" in name else (name,)
