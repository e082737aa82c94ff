"""
What a part of the GPU check has measured, on disk as it comes: a header line, then one JSON line per row.

A row has a `key` that is unique in its part. A part that is started again does not measure the rows that are there, so
an interruption or the end of its time loses nothing. The header says with what settings the rows were made; rows of
other settings are refused, not mixed. A line that was cut short is dropped.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Final, Self

RESULT_VERSION: Final = 1

Row = dict[str, Any]


class OtherSettingsError(Exception):
    """The file has rows that were measured with other settings."""


class RowLog:
    """The file, open for appending, and its rows. Use it as a context manager."""

    def __init__(self, path: Path, settings: Row) -> None:
        """
        Args:
            path: The file; created if missing.
            settings: All that the rows depend on besides the machine (JSON values).

        Raises:
            OtherSettingsError: It has rows of other settings.
        """
        self.rows: list[Row] = []
        header = {"version": RESULT_VERSION, "settings": json.loads(json.dumps(settings))}
        whole = b""
        if path.is_file():
            raw = path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
        if whole:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines[0] != header:
                raise OtherSettingsError(f"{path.name} has rows of other settings: --again measures them anew")
            self.rows = lines[1:]
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, len(whole))
        os.lseek(self._descriptor, len(whole), os.SEEK_SET)
        if not whole:
            self._write(header)

    def has(self, key: str) -> bool:
        """Whether a row with this key is there."""
        return any(row["key"] == key for row in self.rows)

    def add(self, key: str, **values: Any) -> None:
        """Append a row; its time of day is added."""
        row = {"key": key, **values, "at": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._write(row)
        self.rows.append(row)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, value: Row) -> None:
        line = json.dumps(value).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a file; none if there is no file."""
    return _lines(path)[1:]


def read_settings(path: Path) -> Row:
    """The settings of a file's rows; none if there is no file."""
    lines = _lines(path)
    settings: Row = lines[0]["settings"] if lines else {}
    return settings


def _lines(path: Path) -> list[Row]:
    """The complete lines of a file."""
    raw = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
