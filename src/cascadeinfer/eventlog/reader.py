"""
Reading an event log: all its files in order, compressed or not, line by line, with errors that name file and line.

A log whose writer was killed ends in the middle of a line, or lacks its last line; `LogReader.notes` says so, and the
rest is read. Anything else that is wrong ends the reading.
"""

import gzip
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import CascadeError, EventLogError
from cascadeinfer.core.events import Event, InstanceReported
from cascadeinfer.core.policies import POLICIES
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.eventlog.changes import LastReports
from cascadeinfer.eventlog.codec import options_back
from cascadeinfer.eventlog.writer import (
    EFFECT,
    EVENT,
    FORMAT,
    OLDEST_READ,
    SCHEMA_VERSION,
    DroppedLine,
    EndLine,
    EventLine,
    Header,
    Line,
    ObjectLine,
    ReportLine,
)

GZIP_MAGIC: Final = b"\x1f\x8b"
OLDER: Final = re.compile(r"^(?P<newest>.+)\.(?P<age>\d+)\.gz$")
"""How rotation names the files before the newest."""
LONGEST_SHOWN: Final = 60


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a log."""

    path: Path
    line: int

    def __str__(self) -> str:
        """As shown in messages."""
        return f"{self.path}, line {self.line}"


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event of the log with the effects it led to; `failed` names the exception that the policy raised instead."""

    place: Place
    n: int
    at_s: float
    event: Event
    effects: tuple[Effect, ...]
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """A number of events that are missing here."""

    place: Place
    count: int


Entry: TypeAlias = LoggedEvent | Gap


class _Decoders(NamedTuple):
    objects: "msgspec.json.Decoder[ObjectLine]"
    arrays: "msgspec.json.Decoder[ReportLine]"


class _Versioned(msgspec.Struct):
    format: str
    schema_version: int
    version: str = "an unknown version"


@dataclass
class LogReader:
    """
    An event log on disk. Iterating over it, any number of times, gives its events and gaps.

    Attributes:
        header: Header of the first file that exists.
        paths: Its files, oldest first.
        notes: Remarks for the reader, e.g. where the log is cut short. Complete after an iteration.
    """

    header: Header
    paths: Sequence[Path]
    notes: list[str] = field(default_factory=list)

    def spec(self) -> PolicySpec:
        """
        What built the policy.

        Raises:
            EventLogError: This version has no such policy, or the policy has no such option.
        """
        name = self.header.policy
        if name not in POLICIES:
            raise EventLogError(
                f"{self.paths[0]}, line 1: no policy {name!r}; this is version {self.header.version}'s log"
            )
        try:
            return PolicySpec(name, options_back(POLICIES[name].make, self.header.options))
        except (TypeError, ValueError, CascadeError) as error:
            raise EventLogError(f"{self.paths[0]}, line 1: policy {name}: {error}") from error

    def __iter__(self) -> Iterator[Entry]:
        """
        Its events and gaps in order.

        Raises:
            EventLogError: A line is malformed, or event numbers are not consecutive.
        """
        self.notes.clear()
        last_n = 0 if self.header.part == 1 else None
        ended = False
        reports = LastReports()
        for place, line in self._all_lines():
            if ended or (isinstance(line, Header) and place.line != 1):
                raise EventLogError(f"{place}: {'a line after the last one' if ended else 'a second header'}")
            match line:
                case Header():
                    reports.forget()
                case EventLine() | ReportLine():
                    if last_n is not None and line.n != last_n + 1:
                        raise EventLogError(f"{place}: event {line.n} follows event {last_n}: lines are missing")
                    last_n = line.n
                    yield _event_of(place, line, reports)
                case DroppedLine():
                    last_n = None if last_n is None else last_n + line.count
                    yield Gap(place, line.count)
                case EndLine():
                    ended = True
        if not ended and not self.notes:
            self.notes.append(
                f"{self.paths[-1]}: the log has no last line: it is being written, or its writer was killed"
            )

    def _all_lines(self) -> Iterator[tuple[Place, Line]]:
        decoders = _Decoders(msgspec.json.Decoder(ObjectLine), msgspec.json.Decoder(ReportLine))
        for path in self.paths:
            for place, raw in self._lines(path, may_break_off=path == self.paths[-1]):
                yield place, self._decoded(place, raw, decoders)

    def _lines(self, path: Path, *, may_break_off: bool) -> Iterator[tuple[Place, bytes]]:
        """A file's lines. An unfinished one is dropped from the newest file with a note; in others it is an error."""
        number = 0
        try:
            with _opened(path) as file:
                for number, raw in enumerate(file, start=1):
                    if not raw.endswith(b"\n"):
                        break
                    yield Place(path, number), raw
                else:
                    return
        except EOFError:  # a compressed file without its end
            number += 1
        except (OSError, zlib.error) as error:
            raise EventLogError(f"{Place(path, number + 1)}: cannot be read: {error}") from error
        message = f"{Place(path, number)}: the file breaks off here"
        if not may_break_off:
            raise EventLogError(message)
        self.notes.append(f"{message}; its writer was killed, or is writing")

    @staticmethod
    def _decoded(place: Place, raw: bytes, decoders: "_Decoders") -> Line:
        try:
            return decoders.arrays.decode(raw) if raw.startswith(b"[") else decoders.objects.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            shown = raw[:LONGEST_SHOWN].decode(errors="replace").strip()
            raise EventLogError(f"{place}: no line of an event log: {error}: {shown!r}") from None


def _event_of(place: Place, line: EventLine | ReportLine, reports: LastReports) -> LoggedEvent:
    assert EVENT.back is not None
    assert EFFECT.back is not None
    back = EFFECT.back
    try:
        if isinstance(line, ReportLine):
            event: Event = reports.event(line.instance_id, line.cause, line.changed)
        else:
            event = EVENT.back(line.event)
        effects = tuple([back(effect) for effect in line.effects])
    except (ValueError, CascadeError) as error:
        raise EventLogError(f"{place}: {error}") from error
    if isinstance(event, InstanceReported):
        reports.note(event)
    return LoggedEvent(place, line.n, line.at_s, event, effects, line.failed)


def _opened(path: Path) -> "gzip.GzipFile":
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]  # both binary


def read_header(path: Path) -> Header:
    """
    The header of one file.

    Raises:
        EventLogError: It cannot be read, is no event log, or has a schema that this version does not read.
    """
    place = Place(path, 1)
    try:
        with _opened(path) as file:
            raw = file.readline()
    except (OSError, EOFError, zlib.error) as error:
        raise EventLogError(f"{path}: cannot be read: {error}") from error
    try:
        said = msgspec.json.decode(raw, type=_Versioned)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        said = None
    if said is None or said.format != FORMAT:
        raise EventLogError(f"{place}: not an event log: it has no header")
    if not OLDEST_READ <= said.schema_version <= SCHEMA_VERSION:
        raise EventLogError(
            f"{place}: schema {said.schema_version} of {said.version}; this program reads {OLDEST_READ} to "
            f"{SCHEMA_VERSION}: replay it with the version that wrote it"
        )
    try:
        return msgspec.json.decode(raw, type=Header)
    except msgspec.MsgspecError as error:
        raise EventLogError(f"{place}: {error}") from None


def open_log(path: Path) -> LogReader:
    """
    The whole log that a file belongs to.

    Args:
        path: Its newest file, or an older one of the same log.

    Raises:
        EventLogError: There is no such file, it is no event log, or a file between two others is missing.
    """
    header = read_header(path)
    matched = OLDER.match(path.name)
    newest = path.with_name(matched["newest"]) if matched else path
    siblings = [newest, *newest.parent.glob(f"{_escaped(newest.name)}.*.gz")]
    parts = {header.part: (header, path)}
    for sibling in siblings:
        if sibling == path or not sibling.is_file() or not (sibling == newest or OLDER.match(sibling.name)):
            continue
        try:
            found = read_header(sibling)
        except EventLogError:
            continue  # from another run; if this log lacks a part, that is reported below
        if found.run == header.run:
            parts[found.part] = found, sibling
    numbers = sorted(parts)
    for before, after in itertools.pairwise(numbers):
        if after != before + 1:
            raise EventLogError(
                f"{newest}: part {before + 1} of the log is missing (there are {', '.join(map(str, numbers))})"
            )
    return LogReader(parts[numbers[0]][0], [parts[number][1] for number in numbers])


def _escaped(name: str) -> str:
    """The name as a glob pattern that matches only this name."""
    return re.sub(r"([\[\]*?])", r"[\1]", name)
