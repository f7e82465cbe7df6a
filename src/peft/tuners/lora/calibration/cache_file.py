# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A file for what a calibration has found, so that it can be interrupted and need not be done twice."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ....utils.error import PeftValueError
from ....utils.files import write_atomically


# seconds between two writes while the work goes on
_PAUSE = 60.0


class CacheFile:
    """
    What a calibration has found so far, in a file of torch: tensors, numbers and names in dictionaries.

    Args:
        path: the file; None for one that is always empty and never written. Its folder is made at once, so that a
            path that cannot be written is refused before the work and not after it.

    Raises:
        PeftValueError: if the path is a folder.
        OSError: if its folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        self._written = time.monotonic()
        if self.path is not None:
            if os.path.isdir(self.path):
                raise PeftValueError(f"{self.path!r} is a folder; name a file for the calibration")
            os.makedirs(os.path.dirname(self.path), exist_ok=True)

    def read(self) -> dict[str, Any]:
        """
        Give what is in the file; nothing if it is not there, or empty. No code in it is run.

        Raises:
            PeftValueError: if it is no such file.
        """
        if self.path is None or not os.path.isfile(self.path) or not os.path.getsize(self.path):
            return {}
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch raises for what is no file of its own
            raise PeftValueError(f"{self.path!r} cannot be read as a calibration ({error}); delete it") from error
        if not isinstance(content, dict):
            raise PeftValueError(
                f"{self.path!r} holds a {type(content).__name__}, expected the dictionary that a calibration writes; "
                "delete it, or name another file"
            )
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        """
        Replace what is in the file, as a whole.

        Args:
            content: tensors, numbers and names, in dictionaries and lists.
        """
        if self.path is not None:
            write_atomically(self.path, lambda path: torch.save(dict(content), path))
            self._written = time.monotonic()

    @contextmanager
    def keeping(self, content_now: Callable[[], Mapping[str, Any]]) -> Iterator[Callable[[], None]]:
        """
        Keep what is found in a context: now and then, at its end, and if it is interrupted.

        Args:
            content_now: gives what is known at the moment; nothing is written while that is empty.

        Yields:
            A function to be called after each step.
        """

        def write() -> None:
            content = content_now() if self.path is not None else {}
            if content:
                self.write(content)

        def step() -> None:
            if time.monotonic() - self._written > _PAUSE:
                write()

        try:
            yield step
        finally:
            write()
