"""
Files that only their owner can read, from their first byte on.

The mode is set when the file is created, so that it is never wider, and again on the open file: a umask can narrow it,
and a file left by an earlier version may be readable by all. A file of another user whose mode cannot be set is
refused.
"""

import os
import stat
from pathlib import Path
from typing import Final

PRIVATE_MODE: Final = 0o600


def private(path: str, flags: int) -> int:
    """
    The `opener` of a private file, for `open`.

    Raises:
        OSError: It cannot be opened, or others can read it and it is not ours to change.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, PRIVATE_MODE)
    try:
        kept = os.fstat(descriptor)
        # A pipe or terminal named by the operator is left as it is.
        if stat.S_ISREG(kept.st_mode) and stat.S_IMODE(kept.st_mode) != PRIVATE_MODE:
            os.fchmod(descriptor, PRIVATE_MODE)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def make_private(path: Path) -> None:
    """Close a file to others that an earlier run may have left open to them; does nothing if it does not exist."""
    try:
        descriptor = private(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    os.close(descriptor)
