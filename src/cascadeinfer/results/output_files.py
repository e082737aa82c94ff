"""
Output files named by the operator: checked before the work, and written whole or not at all.

A file is written beside its place and then renamed, so that an existing one survives whatever goes wrong. What is not a
regular file (a pipe, `/dev/stdout`) cannot be replaced by renaming: the whole content is copied there at the end.
Writers never see such a path, because some remove a file that they could not write.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cascadeinfer.core.errors import ConfigError


def check_output(path: Path, option: str) -> None:
    """
    Refuse a file that cannot be written.

    Raises:
        ConfigError: It is a folder, its folder does not exist, or nothing can be written there.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", option=option, fix="name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}", option=option, fix="make it, or write elsewhere")
    if _is_special(path):  # opening a pipe would wait for its reader
        if not os.access(path, os.W_OK):
            raise ConfigError(f"cannot write {path}: no permission", option=option)
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            trial.write(b"x")
            trial.flush()
    except OSError as error:
        raise cannot_write(path, option, error) from error


@contextlib.contextmanager
def replacing(path: Path, option: str) -> Iterator[Path]:
    """
    Write a file as a whole.

    Yields:
        Where to write it; renamed to `path` at the end, or removed when anything is raised.

    Raises:
        ConfigError: It cannot be written; an existing file at `path` is untouched.
    """
    special = _is_special(path)
    folder = Path(tempfile.gettempdir()) if special else path.parent
    beside = folder / f".{path.name}.{os.getpid()}.partial"
    try:
        with _refusing(path, option):
            yield beside
            if special:
                with beside.open("rb") as whole, path.open("wb") as target:
                    shutil.copyfileobj(whole, target)
            else:
                beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cannot_write(path: Path, option: str, error: OSError) -> ConfigError:
    """The error for the operator."""
    return ConfigError(
        f"cannot write {path}: {error.strerror or error}", option=option, fix="make room, or write elsewhere"
    )


@contextlib.contextmanager
def _refusing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, option, error) from error


def _is_special(path: Path) -> bool:
    """Whether it exists and is neither a regular file nor a link to one."""
    return path.exists() and not path.is_file()
