"""
The private folder of a running server: sockets of its instances, their temporary files, metrics of its processes.

    TMPDIR/cascadeinfer-XXXXXXXX/    0700, ours
        lock                         locked for the server's life
        metrics/                     Prometheus metrics that several processes share
        logging-ID.json, stage-ID    how an instance's processes log, and how far its start is
        iXXXXXXXX/ ...               one start of one instance: ZMQ's sockets, vLLM's rendezvous file

The server removes it on exit. A killed server leaves it behind, and the next one to start removes it: a folder whose
lock is free has no server. The lock is a POSIX lock: the kernel drops it with the process, however that ended, and
children do not inherit it, so no orphan can hold it. (It is also dropped when its process closes *any* descriptor of
the file, so this module never opens its own lock file again.)

Everybody can write to `TMPDIR`. A folder is swept only if its name and owner are ours and it is a real folder; files in
it are opened relative to the open folder and never through a link. Two starts may race: one that finds, once it holds
its lock, that its folder has been swept takes another.
"""

import contextlib
import errno
import fcntl
import getpass
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cascadeinfer.cluster.process_start import operator_environment
from cascadeinfer.core.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX: Final = "cascadeinfer-"
NAME: Final = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")
LOCK: Final = "lock"
SOCKETS_VARIABLE: Final = "VLLM_RPC_BASE_PATH"
"""Where vLLM creates its sockets, in the processes that inherit this variable."""
COMPILED_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
SOCKET_PATH_MAX_BYTES: Final = 107
"""Of a Unix socket's name, on Linux, without its end."""
SOCKET_NAME_BYTES: Final = len("/cascadeinfer-XXXXXXXX/iXXXXXXXX/") + 36
"""What comes after the base; vLLM's names are UUIDs."""
NEWBORN_S: Final = 60.0
"""Minimum age at which an empty folder without a lock counts as a remnant."""


class RuntimeFolder:
    """
    The folder of this server.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path, lock: int) -> None:
        """
        Args:
            path: The existing folder.
            lock: The descriptor of its locked file.
        """
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, base: Path) -> "RuntimeFolder":
        """
        Create one below `base`.

        Raises:
            ConfigError: `base` is not writable, or too long for a socket's name.
        """
        if len(os.fsencode(base)) + SOCKET_NAME_BYTES > SOCKET_PATH_MAX_BYTES:
            raise ConfigError(
                f"{base} is too long: names of Unix sockets have at most {SOCKET_PATH_MAX_BYTES} bytes",
                option=SOCKETS_VARIABLE if SOCKETS_VARIABLE in os.environ else "TMPDIR",
                fix=f"set {SOCKETS_VARIABLE} to a folder of at most {SOCKET_PATH_MAX_BYTES - SOCKET_NAME_BYTES} bytes",
            )
        while True:
            try:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            except OSError as error:
                raise ConfigError(
                    f"no folder can be made in {base}: {error.strerror}",
                    option="TMPDIR",
                    fix=f"name a folder that can be written, or set {SOCKETS_VARIABLE}",
                ) from error
            if (lock := _lock_new(path)) is not None:
                return cls(path, lock)

    def remove(self) -> None:
        """Remove the folder at the end of the server. Idempotent."""
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):  # somebody has cleared the temporary folder
                _remove(self.path)
            os.close(self._lock)
            self._lock = -1


def instance_folder() -> Path:
    """
    A new folder for one start of an instance, inside this server's folder, or in the socket folder if there is none.
    The caller removes it.
    """
    return Path(tempfile.mkdtemp(prefix="i", dir=operator_environment().get(SOCKETS_VARIABLE)))


def instance_environment(folder: Path) -> dict[str, str]:
    """
    Variables that make an instance's processes put their sockets and temporary files in its folder.

    PyTorch's compile cache would go to the temporary folder too, but must outlive the instance.
    """
    ours = {SOCKETS_VARIABLE: str(folder), "TMPDIR": str(folder)}
    if COMPILED_VARIABLE not in operator_environment():
        ours[COMPILED_VARIABLE] = str(Path(tempfile.gettempdir()) / f"torchinductor_{_user_name()}")
    return ours


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return str(os.geteuid())


def sweep(base: Path) -> list[Path]:
    """Remove what dead servers of this user left below `base`. Returns the removed folders."""
    removed = []
    with contextlib.suppress(FileNotFoundError), os.scandir(base) as entries:
        for entry in entries:
            # A problem with one of them must not keep the server from starting.
            with contextlib.suppress(OSError):
                if NAME.fullmatch(entry.name) and _sweep_one(Path(entry.path)):
                    removed.append(Path(entry.path))
    for path in removed:
        logger.info("removed %s, which a server that was killed had left", path)
    return removed


@contextlib.contextmanager
def runtime_folder() -> Iterator[RuntimeFolder]:
    """
    Sweep, then provide a private folder for the server's life, where vLLM's sockets are made.

    Raises:
        ConfigError: See RuntimeFolder.create.
    """
    said = os.environ.get(SOCKETS_VARIABLE)
    # Always ask: Python caches the answer, and must not compute it first while an instance's variables are set.
    temporary = tempfile.gettempdir()
    base = Path(said or temporary)
    sweep(base)
    folder = RuntimeFolder.create(base)
    os.environ[SOCKETS_VARIABLE] = str(folder.path)
    try:
        yield folder
    finally:
        if said is None:
            os.environ.pop(SOCKETS_VARIABLE, None)
        else:
            os.environ[SOCKETS_VARIABLE] = said
        folder.remove()


def _lock_new(path: Path) -> int | None:
    """Create and lock the lock file in a new folder; None if a concurrent sweep was faster."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EAGAIN}:
            os.close(lock)
            raise
    os.close(lock)
    return None


def _sweep_one(path: Path) -> bool:
    """Remove this folder if it is ours and no server holds it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(folder)
        if about.st_uid != os.geteuid():
            return False
        try:
            lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        except FileNotFoundError:  # it has just been made, or its server was killed before it had a lock
            if time.time() - about.st_mtime < NEWBORN_S:
                return False
            path.rmdir()
            return True
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                return False
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its server lives
            _remove(path)
        finally:
            os.close(lock)
    finally:
        os.close(folder)
    return True


def _remove(path: Path) -> None:
    """Remove a folder of ours, the lock last, so that an interrupted removal is swept the next time."""
    for entry in list(path.iterdir()):
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)  # a process that ends just now may still remove its own
        else:
            entry.unlink(missing_ok=True)
    (path / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has just put something there: the next start finds it without a lock
        path.rmdir()
