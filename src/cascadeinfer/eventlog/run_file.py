"""
The event log of a run that waits for its log, such as a simulation: one file, put in place when the run is over.

A failing disk ends the run. It neither leaves half a log behind nor damages an earlier one.
"""

import contextlib
import gzip
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.eventlog.private_file import private
from cascadeinfer.eventlog.rotation import GZIP_LEVEL
from cascadeinfer.eventlog.writer import Encoder, EndLine, Header, unwritable


@contextlib.contextmanager
def write_log_file(path: Path, header: Header) -> Iterator[Callable[..., None]]:
    """
    Write a whole run to one file (compressed if its name ends in `.gz`), each event before the run continues.

    The file is put in place when the run is over. A run that fails leaves the log of its events up to then, to explain
    the failure.

    Yields:
        A function to call with each event, like an `EventLog`.

    Raises:
        ConfigError: The file cannot be written; nothing of it remains, and an earlier file at `path` is untouched.
    """
    encoder = Encoder()
    with _taking_its_place(path) as beside, contextlib.ExitStack() as stack:
        plain = stack.enter_context(open(beside, "wb", opener=private))
        file = stack.enter_context(gzip.open(plain, "wb", GZIP_LEVEL)) if path.suffix == ".gz" else plain
        file.write(encoder.header(header) + b"\n")
        n = 0

        def observe(now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
            nonlocal n
            n += 1
            file.write(encoder.event((n, now_s, event, effects, failed)) + b"\n")

        yield observe
        file.write(encoder.line(EndLine(n, 0)) + b"\n")


@contextlib.contextmanager
def _taking_its_place(path: Path) -> Iterator[Path]:
    """
    Yield a temporary path for the log and rename it to `path` at the end, even if the run has raised. A pipe or a
    terminal is written directly.

    Raises:
        ConfigError: Writing has failed; the temporary file is removed.
    """
    is_special = path.exists() and not path.is_file()
    beside = path if is_special else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            yield beside
        finally:
            if not is_special and not isinstance(sys.exception(), OSError):
                beside.replace(path)
    except OSError as error:
        if not is_special:
            beside.unlink(missing_ok=True)
        raise unwritable(path, error) from error
