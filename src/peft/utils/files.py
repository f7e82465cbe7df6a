# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Reading JSON that may come from anywhere, and writing files so that a reader never sees half of one."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from .constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .error import PeftValueError


# far more than what any adapter says about itself; reading this much takes less memory than loading torch
MAX_JSON_BYTES = 16 * 2**20


def read_json(path: str | os.PathLike, **hooks: Any) -> dict[str, Any]:
    """
    Read a JSON file that holds one object.

    Args:
        path: the file.
        hooks: for `json.loads`; what they raise as `ValueError` is told with the file's name.

    Raises:
        PeftValueError: if it is not JSON, not an object, or larger than such files can be.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise PeftValueError(f"{os.fspath(path)!r} has more than {MAX_JSON_BYTES:,d} bytes, so it is no such file")
    try:
        text = content.decode("utf-8")
        values = json.loads(text, **hooks)
        if "\\ud" in text.lower():  # half a character, which JSON can escape, but no file and no terminal takes
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise PeftValueError(
            f"{os.fspath(path)!r} is not valid JSON ({error}); save the adapter again, or download it again"
        ) from error
    if not isinstance(values, dict):
        raise PeftValueError(f"{os.fspath(path)!r} holds a {type(values).__name__}, expected an object with fields")
    return values


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """
    Write a file beside its final place and move it there when it is whole.

    If the process is killed, or `write` raises, the old file stays as it was.

    Args:
        path: final path.
        write: is called with the temporary path, in the same folder.
    """
    folder, name = os.path.split(os.fspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    os.close(handle)
    try:
        write(temporary)
        # mkstemp makes files that only the owner can read; saved files follow the user's umask like any other
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


# ------------------------------------------------------------------------------------------ config and weights as one
# An adapter is two files, and a rename moves one. So the new config waits under a name that says to which weights it
# belongs; weights and waiting config are the new adapter from the moment on at which the weights are moved.
_WAITING = re.compile(r"\.adapter_config\.([0-9a-f]{64})\.json")
# both formats have checksums of their tensors near one of their ends
_END = 16 * 2**20


@contextlib.contextmanager
def replacing_adapter(folder: str | os.PathLike) -> Iterator[str]:
    """
    Write a config and weights that belong together, and replace those of a folder by them as one.

    Whenever the process ends, the folder holds the old adapter or the new one, as `config_path` finds them. Other
    files and folders that were written beside them are put into the folder too, one after the other.

    Args:
        folder: an existing folder.

    Yields:
        A folder inside, to write both files to, and any others.
    """
    folder = os.fspath(folder)
    new = tempfile.mkdtemp(prefix=".saving.", dir=folder)
    try:
        yield new
        weights = next(name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if name in os.listdir(new))
        waiting = os.path.join(folder, f".adapter_config.{_fingerprint(os.path.join(new, weights))}.json")
        os.replace(os.path.join(new, CONFIG_NAME), waiting)
        os.replace(os.path.join(new, weights), os.path.join(folder, weights))
        if weights == WEIGHTS_NAME:  # readers would take the other format
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        _move_files(new, folder)  # whatever else a config of the user's own has written
        os.replace(waiting, os.path.join(folder, CONFIG_NAME))
        for name in filter(_WAITING.fullmatch, os.listdir(folder)):
            os.unlink(os.path.join(folder, name))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_files(source: str, folder: str) -> None:
    """Move files, also those in folders, to the same places in another folder, where they replace what is there."""
    for path, _, names in os.walk(source):
        there = os.path.normpath(os.path.join(folder, os.path.relpath(path, source)))
        os.makedirs(there, exist_ok=True)
        for name in names:
            os.replace(os.path.join(path, name), os.path.join(there, name))


def config_path(folder: str) -> tuple[str | None, bool]:
    """
    Find the config that belongs to the weights of a local folder.

    Args:
        folder: a folder, or what may be one.

    Returns:
        Its path, None if there is none; and whether it waits for its place, because saving did not come to its end.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    waiting = {match[1]: name for name in names if (match := _WAITING.fullmatch(name))}
    if waiting:
        weights = (os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        present = next((path for path in weights if os.path.isfile(path)), None)
        name = None if present is None else waiting.get(_fingerprint(present))
        if name is not None and os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name), True
    path = os.path.join(folder, CONFIG_NAME)
    return (path if os.path.isfile(path) else None), False


def state_of_config(folder: str) -> tuple | None:
    """Give what differs once another config stands in a local folder: to see whether somebody saved meanwhile."""
    path, _ = config_path(folder)
    if path is None:
        return None
    try:
        found = os.stat(path)
    except FileNotFoundError:  # a save that was under way has ended meanwhile, and has moved it to its place
        return state_of_config(folder)
    return path, found.st_ino, found.st_mtime_ns, found.st_size


def _fingerprint(path: str) -> str:
    """Hash what tells a weights file from others, without reading all of a large one."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_END))
        file.seek(max(file.tell(), size - _END))
        digest.update(file.read(_END))
    return digest.hexdigest()
