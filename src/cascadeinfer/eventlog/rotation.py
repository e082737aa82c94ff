"""
The files of a log, rotated by size: a full one becomes `PATH.1.gz`, that one `PATH.2.gz`, and so on.

Each file can be read without the others: it begins with a header, and what begins it also forgets what a line might
refer to in the file before (`changes.py`). A line that no longer fits is therefore encoded once more for the next file.
"""

import gzip
import io
import logging
import os
import shutil
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from cascadeinfer.eventlog.private_file import make_private, private

GZIP_LEVEL: Final = 5


class RotatedFiles(RotatingFileHandler):
    """See the module header."""

    def __init__(self, path: Path, begin: Callable[[int], bytes], *, max_bytes: int, files: int) -> None:
        """
        Open the newest file; files of an earlier run are rotated away.

        Args:
            path: The newest file.
            begin: Called with the number of a file that begins, from 1; returns its first line.
            max_bytes: Size at which a file is full.
            files: Maximum number of files kept, >= 2.

        Raises:
            OSError: The file cannot be opened.
        """
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self._header_of = begin
        self._part = 0
        self.namer = lambda name: f"{name}.gz"
        self.rotator = _compress
        for number in range(1, files):
            make_private(Path(f"{path}.{number}.gz"))
        assert self.stream is not None
        if self.stream.tell():
            self.doRollover()
        else:
            self._begin()

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open(self.baseFilename, "ab", opener=private), encoding=self.encoding)

    def doRollover(self) -> None:  # noqa: N802 - the base's name
        """Start a new file."""
        super().doRollover()
        self._begin()

    def _begin(self) -> None:
        assert self.stream is not None
        self._part += 1
        self.stream.write(self._header_of(self._part).decode() + self.terminator)
        self.flush()  # a process that is forked before the next line would write it, too

    def write(self, encode: Callable[[], bytes]) -> None:
        """
        Append a line, to the next file if this one is full.

        Args:
            encode: Encodes the line for the file that is open now.

        Raises:
            OSError: The disk has failed.
        """
        record = logging.makeLogRecord({"msg": encode().decode()})
        if self.shouldRollover(record):
            self.doRollover()
            record = logging.makeLogRecord({"msg": encode().decode()})
        logging.FileHandler.emit(self, record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - the base's signature
        """Called by the handler inside its `except`; passes the exception on to the writer."""
        raise  # noqa: PLE0704 - inside the handler's `except`


def _compress(source: str, target: str) -> None:
    """Replace a full file by a compressed one, atomically."""
    unfinished = f"{target}.unfinished"
    try:
        with (
            open(source, "rb") as full,  # noqa: PTH123 - names from the handler
            open(unfinished, "wb", opener=private) as file,
            gzip.open(file, "wb", compresslevel=GZIP_LEVEL) as small,
        ):
            shutil.copyfileobj(full, small, 1 << 20)
    except OSError:  # a full disk: half a file is useless
        Path(unfinished).unlink(missing_ok=True)
        raise
    os.replace(unfinished, target)  # noqa: PTH105 - the same
    os.unlink(source)  # noqa: PTH108 - the same
