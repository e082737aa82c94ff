"""
The event log: every event that a policy received and the effects it answered with, one JSON value per line.

A log covers one *run*, from a policy's first event on. Its lines are objects, distinguished by `line`:

    header   first in every file: format, what built the policy, which part of the log this file is
    event    number, time on the shell's clock, event, effects; `failed` if the policy raised instead
    dropped  number of events missing before the next one, because the writer could not keep up
    end      the shell stopped in good order, after this many events

or, for most load reports, arrays that begin with `report`: the fields of a `ReportLine`, with what has changed since
the instance's last report in the file (`changes.py`). Most lines of a log are these, so they are short.

The contents of a line follow from `core` (`codec.py`). A log holds no prompts, tokens or outputs, only ids and lengths.
Hashes of prompt blocks, which reveal who sends the same prompt, are replaced by hashes with a key that is not kept:
equal ones stay equal.

There are two writers. `run_file.py` writes at once (a simulation waits for it). `EventLog` is for a server: an event
costs the event loop a place in a bounded buffer, and a thread encodes and writes. Events that do not fit are counted,
and since each event keeps the number it got when it happened, the log shows the gap. Files are rotated by size
(`rotation.py`), and their number is limited. Only the owner can read them (`private_file.py`), because ids and lengths
tell what clients do.
"""

import contextlib
import hashlib
import logging
import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from cascadeinfer import __version__
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.events import Event, InstanceReported, RequestArrived
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.types import InstanceId
from cascadeinfer.eventlog.changes import LastReports, ReportChange
from cascadeinfer.eventlog.codec import options_out, wire_of
from cascadeinfer.eventlog.rotation import RotatedFiles

logger = logging.getLogger(__name__)

FORMAT: Final = "cascadeinfer-event-log"
SCHEMA_VERSION: Final = 3
"""
Of the lines below; fields of events and effects that have defaults may come without a new version.

2: an instance that joins says its kind, of which the capacity is a part.
3: load reports may be written as changes. A log of version 2 is one in which none is.
"""
OLDEST_READ: Final = 2
"""Logs from this version on can be read."""
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


class ReportLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag="report"):
    """
    A load report as a change of the instance's last one in the same file; last fields with their defaults are left out.

    Attributes:
        n: As in an EventLine, like `at_s`, `effects` and `failed`.
        instance_id: The instance.
        cause: The event's cause; None if it is that of the last report.
        changed: The fields that differ; None if none does.
    """

    n: int
    at_s: float
    instance_id: InstanceId
    cause: str | None = None
    changed: ReportChange | None = None
    effects: tuple[WireEffect, ...] = ()
    failed: str | None = None

    def shortened(self) -> list[Any]:
        """The values to write."""
        values = [self.__struct_config__.tag, *msgspec.structs.astuple(self)]
        while values[-1] is None or values[-1] == ():
            values.pop()
        return values


class DroppedLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="line", tag="dropped"):
    """`count` events before the next line's are missing."""

    count: int


class EndLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="line", tag="end"):
    """The run ended in good order after `events` events, of which `dropped` are not in the log."""

    events: int
    dropped: int


ObjectLine: TypeAlias = Header | EventLine | DroppedLine | EndLine
Line: TypeAlias = ObjectLine | ReportLine
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
        self._reports = LastReports()

    def header(self, header: Header) -> bytes:
        """Begin a file: what follows refers to nothing in the one before."""
        self._reports.forget()
        return self._json.encode(header)

    def line(self, line: DroppedLine | EndLine) -> bytes:
        """Encode a gap or the end."""
        return self._json.encode(line)

    def event(self, logged: Logged) -> bytes:
        """Encode an event."""
        n, at_s, event, effects, failed = logged
        if isinstance(event, RequestArrived) and event.prefix_hashes:
            event = replace(event, prefix_hashes=tuple([self._keyed(value) for value in event.prefix_hashes]))
        assert EVENT.out is not None
        assert EFFECT.out is not None
        out = EFFECT.out
        done = tuple([out(effect) for effect in effects])
        if not isinstance(event, InstanceReported):
            return self._json.encode(EventLine(n, at_s, EVENT.out(event), done, failed))
        change = self._reports.change(event)
        if change is None:
            encoded = self._json.encode(EventLine(n, at_s, EVENT.out(event), done, failed))
        else:
            encoded = self._json.encode(ReportLine(n, at_s, event.instance_id, *change, done, failed).shortened())
        self._reports.note(event)
        return encoded

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
        self._header = header
        self._encoder = Encoder()
        try:
            self._files = RotatedFiles(path, self._begin, max_bytes=max_bytes, files=files)
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
            ended = EndLine(self.events, self.events - self._written)
            self._files.write(lambda: self._encoder.line(ended))
        except OSError as error:
            logger.exception("event log: %s ends here, serving goes on", self._path, exc_info=error)
            self.failure = error.strerror or str(error)
        finally:
            with contextlib.suppress(OSError):
                self._files.close()

    def _begin(self, part: int) -> bytes:
        """The first line of a file."""
        return self._encoder.header(msgspec.structs.replace(self._header, part=part))

    def _write(self, logged: Logged) -> None:
        n = logged[0]
        self._mark_gap(n)
        try:
            self._files.write(lambda: self._encoder.event(logged))
        except (TypeError, ValueError, OverflowError):  # not representable in JSON: the log continues without it
            logger.exception("event log: event %d cannot be written: %r", n, logged[2])
            self.dropped += 1
            return
        self._last_n = n
        self._written += 1

    def _mark_gap(self, n: int) -> None:
        """Record that events before this number are missing."""
        if n > self._last_n + 1:
            gap = DroppedLine(n - self._last_n - 1)
            self._files.write(lambda: self._encoder.line(gap))
            self._last_n = n - 1
