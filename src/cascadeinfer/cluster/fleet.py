"""
A fleet: engines that have a name together, and that outlive the servers which use them.

    BASE/cascadeinfer-fleets-UID/NAME/     0700, ours
        lock            locked by the server that uses the fleet, with its process id in it
        record          what its engines were started with
        key             authenticates front ends and engines to each other
        instances/, logs/                  see `local_keepers.py`

BASE is the folder of vLLM's sockets, or the temporary one. A fleet belongs to one user and one machine. One server at a
time uses it, and the kernel drops its lock when it ends, however that is.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from cascadeinfer.cluster.keeping import KEY, read_json, write_whole
from cascadeinfer.cluster.runtime_folder import SOCKET_PATH_MAX_BYTES, SOCKETS_VARIABLE
from cascadeinfer.core.errors import ConfigError

logger = logging.getLogger(__name__)

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
OPTION: Final = "--fleet"
INSTANCES: Final = "instances"
LOCK: Final = "lock"
RECORD: Final = "record"
SOCKET_NAME_BYTES: Final = len("/instances/1234/handshake")


class Update(msgspec.Struct, frozen=True):
    """
    What some of a fleet's engines were started with instead, while a rolling update is under way.

    Attributes:
        words: What it changes of the record's options, as words of a command line.
        mark: What such an engine says of itself, see `knocking.About`.
    """

    words: tuple[str, ...]
    mark: str


class Record(msgspec.Struct, frozen=True):
    """
    What a fleet's engines were started with.

    Attributes:
        version: Of this program.
        vllm: Of vLLM.
        model: As the server was told.
        options: Of the engines, by their flags, where they differ from the defaults.
        updates: What further engines were started with, while a rolling update is under way.
    """

    version: str
    vllm: str
    model: str
    options: Mapping[str, str]
    updates: tuple[Update, ...] = ()

    @property
    def unfinished(self) -> str:
        """The kinds of engines, in words, while a rolling update is under way; else empty."""
        words = [" ".join(update.words) for update in self.updates]
        return " and ".join(["the options before", *words]) if words else ""

    def differences(self, asked: "Record", apart: Collection[str] = ()) -> list[str]:
        """
        In words, in what a server that asks for this differs from the engines that run, updates apart.

        Args:
            asked: By the server.
            apart: Flags of options that may differ, and "the model".
        """
        pairs = [
            ("cascadeinfer", self.version, asked.version),
            ("vLLM", self.vllm, asked.vllm),
            ("the model", self.model, asked.model),
            *(
                (flag, self.options.get(flag, "its default"), asked.options.get(flag, "its default"))
                for flag in sorted({*self.options, *asked.options})
            ),
        ]
        differing = (pair for pair in pairs if pair[1] != pair[2] and pair[0] not in apart)
        return [f"{name} is {runs}, not {wanted}" for name, runs, wanted in differing]


class Fleet:
    """
    One fleet, used by this process.

    Attributes:
        name: Its name.
        path: Its folder.
    """

    def __init__(self, name: str, path: Path, lock: int) -> None:
        """
        Args:
            name: See Fleet.
            path: The existing folder.
            lock: The descriptor of its locked file.
        """
        self.name = name
        self.path = path
        self._lock = lock

    @classmethod
    def take(cls, name: str, base: Path | None = None, *, wait: bool = False) -> "Fleet":
        """
        Use a fleet, which begins to exist if there is none of this name.

        Args:
            name: Letters, digits, dots, dashes.
            base: See the module header.
            wait: Block until no other server uses it.

        Raises:
            ConfigError: The name is none, another server uses it, or its folder cannot be made.
        """
        path = folder_of(name, base)
        while True:
            make_for_engines(path, OPTION)
            try:
                lock = _locked(name, path / LOCK, wait=wait)
            except FileNotFoundError:
                continue  # the fleet is being stopped, and its folder has just been removed
            if _is_file(lock, path / LOCK):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                return cls(name, path, lock)
            os.close(lock)  # the fleet was stopped in the meantime, and its folder removed

    @classmethod
    @contextlib.contextmanager
    def used(cls, name: str, *, wait: bool) -> "Iterator[Fleet]":
        """In this context, this process uses a fleet, whose folder and logs stay until it is stopped. See `take`."""
        fleet = cls.take(name, wait=wait)
        try:
            yield fleet
        finally:
            fleet.leave()

    def record(self) -> Record | None:
        """What its engines were started with; None for a new fleet."""
        try:
            told: Record = read_json(self.path / RECORD, Record)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"the record of {self.name} cannot be read: {error}",
                option=OPTION,
                fix=f"cascadeinfer stop {self.name}",
            ) from error
        return told

    def write(self, record: Record) -> None:
        """Its engines are started with this from now on."""
        write_whole(self.path / RECORD, msgspec.json.encode(record))

    def key(self) -> str:
        """The secret of its engines and front ends."""
        path = self.path / KEY
        if not path.exists():
            write_whole(path, secrets.token_hex(32).encode())
        return path.read_text(encoding="ascii")

    def leave(self) -> None:
        """Use it no longer. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """It has no engines any more: forget it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.leave()


def folder_of(name: str, base: Path | None = None) -> Path:
    """
    A fleet's folder.

    Raises:
        ConfigError: That is no name.
    """
    check_name(name)
    return fleets_folder(base) / name


def check_name(name: str) -> None:
    """Raises ConfigError if that is no name of a fleet."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a fleet", option=OPTION, fix="letters, digits, dots and dashes, 32 at most"
        )


def sockets_base() -> Path:
    """Where folders with sockets in them are made."""
    return Path(os.environ.get(SOCKETS_VARIABLE) or tempfile.gettempdir())


def fleets_folder(base: Path | None = None) -> Path:
    """Where this user's fleets are."""
    return (base or sockets_base()) / f"cascadeinfer-fleets-{os.geteuid()}"


def names(base: Path | None = None) -> list[str]:
    """Of this user's fleets."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in fleets_folder(base).iterdir() if NAME.fullmatch(path.name))
    return []


def user_of(name: str, base: Path | None = None) -> int | None:
    """The process id of the server that uses a fleet; None if none does, or there is no such fleet."""
    try:
        lock = os.open(folder_of(name, base) / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EAGAIN}:
            raise
        said = os.pread(lock, 20, 0).decode()
        return int(said) if said.isdecimal() else None
    finally:
        os.close(lock)
    return None


def _locked(name: str, path: Path, *, wait: bool) -> int:
    """The descriptor of a lock file, locked. Raises ConfigError if another process has it, unless told to wait."""
    # The lock goes with any descriptor of the file that this process closes: nothing else here opens it.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EAGAIN}:
            raise
    else:
        return lock
    user = os.pread(lock, 20, 0).decode() or "?"
    if wait:
        logger.info("standing by: this server waits for the end of the one with process id %s", user)
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return lock
    os.close(lock)
    raise ConfigError(
        f"the server with process id {user} uses {name} already",
        option=OPTION,
        fix="stop that one, name another fleet, or add --standby to wait for its end",
    )


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def make_for_engines(folder: Path, option: str | None = None) -> None:
    """
    Make a folder that holds engines' own folders, and the one above it; see `make_ours`.

    Raises:
        ConfigError: It cannot be made, or the sockets in it would have names that are too long.
    """
    if len(os.fsencode(folder)) + SOCKET_NAME_BYTES > SOCKET_PATH_MAX_BYTES:
        raise ConfigError(
            f"{folder} is too long for the names of sockets in it", option=option, fix=f"set {SOCKETS_VARIABLE}"
        )
    for each in (folder.parent, folder):
        make_ours(each)


def make_ours(folder: Path) -> None:
    """Make a folder that only this user can enter; refuse one that is anybody else's, or a link."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        said = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}", option=OPTION, fix=f"set {SOCKETS_VARIABLE}"
        ) from error
    if not stat.S_ISDIR(said.st_mode) or said.st_uid != os.geteuid() or said.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is not a folder of this user alone",
            option=OPTION,
            fix=f"chmod 700 it, or set {SOCKETS_VARIABLE}",
        )
