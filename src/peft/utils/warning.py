# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The warning category of the package, and the way to give one."""

import contextlib
import functools
import os
import sys
import warnings

from .error import shortened


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# frames between the caller and this package: dataclasses, context managers and decorators
_PASSED_OVER = (_PACKAGE, "<string>", contextlib.__file__, functools.__file__)


class PeftWarning(UserWarning):
    """Base class of the package's warnings, so that all of them can be filtered at once."""


class PeftRuntimeWarning(PeftWarning, RuntimeWarning):
    """A part of a config that has no effect on this model; callers of the released package filter by its base."""


def warn(message: str, category: type[Warning] = PeftWarning) -> None:
    """
    Give a warning that points at the caller's code, however deep in the package it arises.

    Args:
        message: what is wrong, what was found and what to do.
        category: its class.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(shortened(message), category, stacklevel=level)
