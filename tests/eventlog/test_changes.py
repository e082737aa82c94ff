"""Load reports written as changes: what is read is what happened, in every file on its own, and replays the same."""

import gzip
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import IDS, SPECS, Seen, header_for, lines_of, simulated_log, simulated_run, without_hashes, write_lines

from cascadeinfer.core.effects import Dispatch, Effect
from cascadeinfer.core.errors import EventLogError
from cascadeinfer.core.events import Event, InstanceReport, InstanceReported
from cascadeinfer.eventlog.reader import LoggedEvent, LogReader, open_log, read_header
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.eventlog.run_file import write_log_file
from cascadeinfer.eventlog.writer import EventLog
from support.event_values import values_of

REPORT = InstanceReport(("r1", "r2"), (10, 20), ("r3",), (5,), 4, 0.01)
ENOUGH = 1_000_000
MOST_FILES = 100
"""Files are never deleted here."""


def rotated_log(path: Path, name: str, max_bytes: int, requests: int, seed: int) -> Seen:
    """A simulated run with a server's log, whose files are full after so many bytes; returns what happened."""
    spec = SPECS[name]
    seen: Seen = []
    log = EventLog(path, header_for(spec), max_bytes=max_bytes, files=MOST_FILES, buffered_events=ENOUGH)

    def observe(now_s: float, event: Event, effects: list[Effect]) -> None:
        log(now_s, event, effects)
        seen.append((event, list(effects)))

    simulated_run(spec, observe, requests=requests, seed=seed)
    log.close(timeout_s=600.0)
    assert log.dropped == 0
    return seen


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(SPECS)), st.sampled_from([8_000, 30_000, 400_000]), st.integers(1, 60), st.integers(0, 99)
)
def test_every_part_is_read_alone_and_the_whole_replays(name: str, max_bytes: int, requests: int, seed: int) -> None:
    """Whatever the policy, the load and the size of the files: all events come back, and the replay does the same."""
    with tempfile.TemporaryDirectory() as folder:
        seen = rotated_log(Path(folder) / "log", name, max_bytes, requests, seed)
        log = open_log(Path(folder) / "log")
        entries = [entry for entry in log if isinstance(entry, LoggedEvent)]
        assert [(without_hashes(e.event), list(e.effects)) for e in entries] == [
            (without_hashes(event), effects) for event, effects in seen
        ]
        alone = [entry for path in log.paths for entry in LogReader(read_header(path), [path])]
        assert [replace(e, place=None) for e in alone] == [replace(e, place=None) for e in entries]  # type: ignore[arg-type,type-var]
        assert replay(log).difference is None


def test_a_file_begins_with_reports_in_full(tmp_path: Path) -> None:
    """In each of several files, the first report of an instance is in full; a line that did not fit is written anew."""
    rotated_log(tmp_path / "log", "round_robin", 12_000, 60, 0)
    log = open_log(tmp_path / "log")
    assert len(log.paths) > 2
    for path in log.paths:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        in_full: set[str] = set()
        for line in content.splitlines()[1:]:
            told = msgspec.json.decode(line)
            if isinstance(told, list):
                assert told[3] in in_full
            elif told["line"] == "event" and told["event"]["type"] == "InstanceReported":
                assert told["event"]["instance_id"] not in in_full
                in_full.add(told["event"]["instance_id"])
        assert in_full


@given(st.lists(st.tuples(st.sampled_from(IDS), st.text(max_size=3), values_of(InstanceReport)), max_size=6))
@settings(deadline=None)
def test_any_reports_come_back(reports: list[tuple[str, str, InstanceReport]]) -> None:
    """Reports of several instances, in any order and with any contents, come back equal."""
    events = [InstanceReported(cause, instance_id, report) for instance_id, cause, report in reports]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with write_log_file(path, header_for(SPECS["round_robin"])) as write:
            for event in events:
                write(0.0, event, [])
        assert [entry.event for entry in open_log(path)] == events


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    """An unchanged report costs a short line; in a changed one, known requests are numbers."""
    same = InstanceReported("report:i0:7", "i0", REPORT)
    longer = replace(REPORT, running_ids=("r2", "r3", "r4"), running_tokens=(21, 6, 9), waiting_ids=())
    placed = Dispatch("x", "r5", "i0")
    with write_log_file(tmp_path / "log", header_for(SPECS["round_robin"])) as write:
        write(0.0, same, [])
        write(0.5, same, [])
        write(1.0, replace(same, report=longer), [placed], "KeyError")
    lines = lines_of(tmp_path / "log")
    assert b'"InstanceReported"' in lines[1]
    assert lines[2] == b'["report",2,0.5,"i0"]\n'
    changed = b'{"running_ids":[1,2,"r4"],"running_tokens":[21,6,9],"waiting_ids":[]}'
    assert lines[3].startswith(b'["report",3,1.0,"i0",null,' + changed + b',[{"type":"Dispatch"')
    assert lines[3].endswith(b'],"KeyError"]\n')
    last = list(open_log(tmp_path / "log"))[-1]
    assert isinstance(last, LoggedEvent)
    assert (last.event, last.effects, last.failed) == (replace(same, report=longer), (placed,), "KeyError")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'["report",2,0,"i1"]\n', "instance i1's report, of which this file has none"),
        (b'["report",2,0,"i0",null,{"waiting_ids":[3]}]\n', "request 3 of a"),
        (b'["report",2,0,"i0",null,{"waiting_ids":[-1]}]\n', "request -1 of a"),
        (b'["report",2,0,"i0",null,{"mood":1}]\n', "unknown field `mood`"),
        (b'["report",2,0]\n', "no line of an event log: Expected `array` of at least length"),
        (b'["rumour",2,0,"i0"]\n', "no line of an event log: Invalid value 'rumour'"),
    ],
)
def test_a_change_of_nothing_is_told(tmp_path: Path, line: bytes, message: str) -> None:
    """A change that refers to a report or a request that the file lacks is an error of its line."""
    path = tmp_path / "log"
    with write_log_file(path, header_for(SPECS["round_robin"])) as write:
        write(0.0, InstanceReported("c", "i0", REPORT), [])
    lines = lines_of(path)
    write_lines(path, [*lines[:2], line])
    with pytest.raises(EventLogError, match=f"line 3: .*{message}"):
        list(open_log(path))


def test_logs_of_the_version_before_are_read(tmp_path: Path) -> None:
    """A log of schema 2, in which every report is in full, is read and replays the same."""
    path = tmp_path / "log"
    seen = simulated_log(path, SPECS["cascade"], requests=30)
    old = tmp_path / "old"
    header = lines_of(path)[0].replace(b'"schema_version":3', b'"schema_version":2')
    in_full = []
    for entry in open_log(path):
        assert isinstance(entry, LoggedEvent)
        with write_log_file(tmp_path / "one", header_for(SPECS["cascade"])) as write:
            write(entry.at_s, entry.event, entry.effects)
        in_full.append(lines_of(tmp_path / "one")[1].replace(b'"n":1,', b'"n":%d,' % entry.n, 1))
    write_lines(old, [header, *in_full])
    assert not any(line.startswith(b"[") for line in lines_of(old))
    assert replay(open_log(old)).events == len(seen)
    assert replay(open_log(old)).difference is None
