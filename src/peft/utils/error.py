# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Exceptions of the package.

Each derives from `PeftError` and from the built-in class that callers of the released package catch.
"""

# characters; what was found may come from a file, and be as long as that
LONGEST_MESSAGE = 4_000


def shortened(message: str) -> str:
    """Leave out the middle of a message that nobody could read: its end says what to do."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE * 3 // 4]} [...] {message[-LONGEST_MESSAGE // 4 :]}"


class PeftError(Exception):
    """Base class of every exception that the package raises on purpose."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class PeftValueError(PeftError, ValueError):
    """A value that cannot work; the message says what was found and what to do."""


class PeftTypeError(PeftError, TypeError):
    """An argument of the wrong type."""


class PeftRuntimeError(PeftError, RuntimeError):
    """Something that was asked for cannot be done with this model or file."""


class PeftImportError(PeftError, ImportError):
    """A package that is needed is missing, or too old."""


class PeftAttributeError(PeftError, AttributeError):
    """Something that a model or a config has to have, and does not."""


class PeftNotImplementedError(PeftError, NotImplementedError):
    """A feature that this version does not have."""


class PeftKeyError(PeftError, KeyError):
    """A name that was looked up and is not there."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which makes sentences unreadable
        return shortened(str(self.args[0])) if self.args else ""


class PeftMissingKeyError(PeftKeyError, PeftTypeError):
    """A file that lacks an entry without which nothing can be made of it."""


class PeftIndexError(PeftValueError, IndexError):
    """A number that points outside of what there is."""


class PeftPathError(PeftValueError, AssertionError):
    """A path that cannot be read from or written to as asked."""


class PeftConfigError(PeftValueError, PeftTypeError):
    """A config whose fields cannot be what they are, or not beside those of another one."""


class NoMatchingPeftModuleError(PeftValueError):
    """No module of the model matches what the config targets."""
