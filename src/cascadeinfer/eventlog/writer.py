"""
The event log: every event that a policy received and the effects it answered with, one JSON object per line.

A log covers one *run*, from a policy's first event on. Its lines are distinguished by `line`:

    header   first in every file: format, what built the policy, which part of the log this file is
    event    number, time on the shell's clock, event, effects; `failed` if the policy raised instead
    dropped  number of events missing before the next one, because the writer could not keep up
    end      the shell stopped in good order, after this many events

The contents of a line follow from `core` (`codec.py`). A log holds no prompts, tokens or outputs, only ids and lengths.
Hashes of prompt blocks, which reveal who sends the same prompt, are replaced by hashes with a key that is not kept:
equal ones stay equal.

There are two writers. `run_file.py` writes at once (a simulation waits for it). `EventLog` is for a server: an event
costs the event loop a place in a bounded buffer, and a thread encodes and writes. Events that do not fit are counted,
and since each event keeps the number it got when it happened, the log shows the gap. Files are rotated by size with
`logging`'s own handler; older ones are compressed, and their number is limited. Only the owner can read them
(`private_file.py`), because ids and lengths tell what clients do.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import os
import queue
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from cascadeinfer import __version__
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.events import Event, RequestArrived
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.types import InstanceId
from cascadeinfer.eventlog.codec import options_out, wire_of
from cascadeinfer.eventlog.private_file import make_private, private

logger = logging.getLogger(__name__)

FORMAT: Final = "cascadeinfer-event-log"
SCHEMA_VERSION: Final = 2
"""
Of the lines below; fields of events and effects that have defaults may come without a new version.

2: an instance that joins says its kind, of which the capacity is a part.
"""
EVENT: Final = wire_of(Event)
EFFECT: Final = wire_of(Effect)
if TYPE_CHECKING:  # defined at run time
    WireEvent: TypeAlias = Any
    WireEffect: TypeAlias = Any
else:
    WireEvent = EVENT.hint
    WireEffect = EFFECT.hint
BUFFERED_EVENTS: Final = 8192
"""Events that may wait for the writer: seconds of a busy cluster, tens of MB if all are long reports."""
CLOSE_TIMEOUT_S: Final = 5.0
"""How long a stopping server waits for a slow disk."""
GZIP_LEVEL: Final = 5


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="line", tag="header"):
    """
    The first line of every file.

    Attributes:
        run: Id of the log; the same in all its files.
        part: Number of this file within the log, from 1.
        source: `runtime` or `simulator`.
        version: Version of the program.
        commit: Commit of the checkout it ran from, if any.
        started_at: When the run began (ISO 8601, UTC).
        policy: Name of the policy.
        options: Its options (`codec.py`).
        instances: Instances known at the start.
        profile: Name of the cost profile, if any; the options contain what the policy uses of it.
        about: Further information for the reader (rate, seed and trace of a simulation).
    """

    format: str
    schema_version: int
    run: str
    part: int
    source: str
    version: str
    commit: str | None
    started_at: str
    policy: str
    options: dict[str, Any]
    instances: tuple[InstanceId, ...]
    profile: str | None = None
    about: dict[str, Any] = {}


class EventLine(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="line", tag="event"
):
    """
    One event.

    Attributes:
        n: Number of the event in the run, from 1.
        at_s: Time on the shell's clock.
        event: The event.
        effects: The policy's effects.
        failed: The exception that the policy raised, if it did; there are then no effects.
    """

    n: int
    at_s: float
    event: WireEvent
    effects: tuple[WireEffect, ...] = ()
    failed: str | None = None


class DroppedLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="line", tag="dropped"):
    """`count` events before the next line's are missing."""

    count: int


class EndLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="line", tag="end"):
    """The run ended in good order after `events` events, of which `dropped` are not in the log."""

    events: int
    dropped: int


Line: TypeAlias = Header | EventLine | DroppedLine | EndLine
Logged: TypeAlias = tuple[int, float, Event, Sequence[Effect], str | None]
"""Number, time, event, effects, exception."""


def header_of(
    spec: PolicySpec,
    *,
    source: str,
    instances: Sequence[InstanceId],
    commit: str | None,
    profile: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Header:
    """
    The header of a new run's first file.

    Raises:
        TypeError: An option of the policy cannot be serialised.
    """
    return Header(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        run=secrets.token_hex(8),
        part=1,
        source=source,
        version=__version__,
        commit=commit,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        policy=spec.name,
        options=options_out(POLICIES[spec.name].make, spec.options),
        instances=tuple(instances),
        profile=profile,
        about=dict(about or {}),
    )


class Encoder:
    """Encodes the lines of one run."""

    def __init__(self) -> None:
        """Create a key for the hashes of this run's prompts."""
        self._json = msgspec.json.Encoder()
        self._key = secrets.token_bytes(16)

    def line(self, line: Line) -> bytes:
        """Encode a header, a gap or the end."""
        return self._json.encode(line)

    def event(self, logged: Logged) -> bytes:
        """Encode an event."""
        n, at_s, event, effects, failed = logged
        if isinstance(event, RequestArrived) and event.prefix_hashes:
            event = replace(event, prefix_hashes=tuple([self._keyed(value) for value in event.prefix_hashes]))
        assert EVENT.out is not None
        assert EFFECT.out is not None
        out = EFFECT.out
        return self._json.encode(EventLine(n, at_s, EVENT.out(event), tuple([out(e) for e in effects]), failed))

    def _keyed(self, value: int) -> int:
        raw = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
        return int.from_bytes(hashlib.blake2b(raw, key=self._key, digest_size=7).digest(), "little")


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The error for the operator."""
    return ConfigError(
        f"cannot write {path}: {error.strerror or error}",
        option="--event-log",
        fix="make room, or name a file in a folder that exists and can be written",
    )


class _Files(RotatingFileHandler):
    """The files of a run, each with a header. A full one becomes `PATH.1.gz`, that one `PATH.2.gz`, and so on."""

    def __init__(self, path: Path, header: Header, encoder: Encoder, *, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self._header = header
        self._encoder = encoder
        self._part = 0
        self.namer = lambda name: f"{name}.gz"
        self.rotator = _compress
        for number in range(1, files):
            make_private(Path(f"{path}.{number}.gz"))
        assert self.stream is not None
        if self.stream.tell():
            self.doRollover()  # files of an earlier run are rotated away
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
        header = msgspec.structs.replace(self._header, part=self._part)
        self.stream.write(self._encoder.line(header).decode() + self.terminator)

    def write(self, line: bytes) -> None:
        """Append a line, to the next file if this one is full. Raises OSError."""
        self.emit(logging.makeLogRecord({"msg": line.decode()}))

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


class EventLog:
    """
    The log of a server. See the module header.

    Attributes:
        events: Number of events so far.
        dropped: How many of them are not in the log, because the buffer was full or the disk failed.
        failure: Why nothing more is written; None while all is well.
    """

    def __init__(
        self, path: Path, header: Header, *, max_bytes: int, files: int, buffered_events: int = BUFFERED_EVENTS
    ) -> None:
        """
        Open the file and start the thread that writes to it.

        Args:
            path: The newest file; older ones are `PATH.1.gz`, `PATH.2.gz` and so on.
            header: Header of the run.
            max_bytes: Size at which a file is full.
            files: Maximum number of files kept, >= 2.
            buffered_events: Maximum number of events waiting for the thread.

        Raises:
            ConfigError: The file cannot be written.
        """
        self.events = 0
        self.dropped = 0
        self.failure: str | None = None
        self._path = path
        self._encoder = Encoder()
        try:
            self._files = _Files(path, header, self._encoder, max_bytes=max_bytes, files=files)
        except OSError as error:
            raise unwritable(path, error) from error
        self._buffer: queue.Queue[Logged | None] = queue.Queue(buffered_events)
        self._written = 0
        self._last_n = 0
        self._thread = threading.Thread(target=self._write_all, name="event-log", daemon=True)
        self._thread.start()

    def __call__(self, now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
        """Record an event; never waits."""
        self.events += 1
        if self.failure is not None:
            self.dropped += 1
            return
        try:
            self._buffer.put_nowait((self.events, now_s, event, effects, failed))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write the remaining events and the last line."""
        with contextlib.suppress(queue.Full):
            self._buffer.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("event log: %s is not written to its end: the disk takes too long", self._path)

    def _write_all(self) -> None:
        """Body of the writer thread."""
        try:
            while (logged := self._buffer.get()) is not None:
                self._write(logged)
            self._mark_gap(self.events + 1)
            self._files.write(self._encoder.line(EndLine(self.events, self.events - self._written)))
        except OSError as error:
            logger.exception("event log: %s ends here, serving goes on", self._path, exc_info=error)
            self.failure = error.strerror or str(error)
        finally:
            with contextlib.suppress(OSError):
                self._files.close()

    def _write(self, logged: Logged) -> None:
        n = logged[0]
        try:
            line = self._encoder.event(logged)
        except (TypeError, ValueError, OverflowError):  # not representable in JSON: the log continues without it
            logger.exception("event log: event %d cannot be written: %r", n, logged[2])
            self.dropped += 1
            return
        self._mark_gap(n)
        self._files.write(line)
        self._last_n = n
        self._written += 1

    def _mark_gap(self, n: int) -> None:
        """Record that events before this number are missing."""
        if n > self._last_n + 1:
            self._files.write(self._encoder.line(DroppedLine(n - self._last_n - 1)))
