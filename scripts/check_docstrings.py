# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Check that every public name of `peft`, and every public method that a public class adds, has a docstring."""

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType


def missing_docstrings(module: ModuleType) -> Iterator[str]:
    """
    Yield the dotted names in `module.__all__`, and of their public methods, that nothing is written about.

    An override without a docstring passes where the method that it overrides has one. Data (tables, aliases) cannot
    carry a docstring and is passed over.
    """
    for name in sorted(module.__all__):
        value = getattr(module, name)
        path = f"{module.__name__}.{name}"
        if inspect.isclass(value):
            if not has_own_docstring(value):
                yield path
            yield from (f"{path}.{method}" for method in undocumented_methods(value))
        elif callable(value) and not inspect.getdoc(value):
            yield path


def has_own_docstring(cls: type) -> bool:
    """Whether somebody wrote a docstring: one is neither inherited nor the signature that a dataclass makes up."""
    doc = vars(cls).get("__doc__")
    return bool(doc) and not doc.startswith(f"{cls.__name__}(")


def undocumented_methods(cls: type) -> list[str]:
    """Public methods and properties in the body of `cls` without a docstring of their own or of what they override."""
    methods = {name: value for name, value in vars(cls).items() if not name.startswith("_") and is_method(value)}
    return [name for name in methods if not any(getattr(vars(c).get(name), "__doc__", None) for c in cls.__mro__)]


def is_method(value: object) -> bool:
    """Whether `value`, as it stands in a class body, is a method or a property."""
    return inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property))


def main() -> int:
    import peft

    missing = list(missing_docstrings(peft))
    for path in missing:
        print(f"{path} has no docstring")
    print(f"{len(peft.__all__)} public names checked, {len(missing)} docstrings missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
