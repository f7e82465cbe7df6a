# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Writing files so that a reader never sees half of one."""

import os
import tempfile
from collections.abc import Callable


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
