"""Writing event logs: headers, rotation, gaps, broken disks, and what is never written."""

import gzip
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from log_files import SPECS, arrival, header_for

from cascadeinfer.core.effects import Dispatch
from cascadeinfer.core.errors import ConfigError
from cascadeinfer.core.events import TimerFired
from cascadeinfer.eventlog import rotation, writer
from cascadeinfer.eventlog.reader import Gap, LoggedEvent, open_log, read_header
from cascadeinfer.eventlog.run_file import write_log_file
from cascadeinfer.eventlog.unwritten_log import UnwrittenLog
from cascadeinfer.eventlog.writer import EventLog

MB = 1_000_000


def start_log(path: Path, *, max_bytes: int = MB, files: int = 4, buffered_events: int = 8192) -> EventLog:
    """A server's event log."""
    spec = SPECS["least_loaded"]
    return EventLog(path, header_for(spec), max_bytes=max_bytes, files=files, buffered_events=buffered_events)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Events come back in order, with numbers, times, effects and failures; the log has an end and no notes."""
    log = start_log(tmp_path / "log")
    placed = Dispatch("r1", "r1", "a")
    log(1.5, arrival(1), [placed])
    log(2.25, TimerFired("timer"), [], "ValueError")
    log.close()
    reader = open_log(tmp_path / "log")
    entries = list(reader)
    assert [(e.n, e.at_s, e.event, e.effects, e.failed) for e in entries if isinstance(e, LoggedEvent)] == [
        (1, 1.5, arrival(1), (placed,), None),
        (2, 2.25, TimerFired("timer"), (), "ValueError"),
    ]
    assert len(entries) == 2
    assert not reader.notes
    assert (log.events, log.dropped) == (2, 0)


def test_the_header_is_in_the_file_before_the_first_event(tmp_path: Path) -> None:
    """A process that is forked with an unwritten header would write it once more when it ends."""
    log = start_log(tmp_path / "log")
    assert (tmp_path / "log").read_text().count('"line":"header"') == 1
    log.close()


def test_files_are_rotated_compressed_and_bounded(tmp_path: Path) -> None:
    """Full files are compressed, a bounded number is kept, each has its part's header, and all read as one log."""
    log = start_log(tmp_path / "log", max_bytes=2000, files=3)
    for i in range(100):
        log(float(i), arrival(i), [])
    log.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "log.1.gz", "log.2.gz"]
    headers = [read_header(tmp_path / name) for name in ("log.2.gz", "log.1.gz", "log")]
    assert headers[1].part == headers[0].part + 1
    assert headers[2].part == headers[0].part + 2
    assert len({header.run for header in headers}) == 1
    assert (tmp_path / "log").stat().st_size <= 2000
    for name in names:
        reader = open_log(tmp_path / name)
        numbers = [entry.n for entry in reader if isinstance(entry, LoggedEvent)]
        assert numbers == list(range(numbers[0], 101))
        assert numbers[0] > 1


def test_an_earlier_log_moves_aside(tmp_path: Path) -> None:
    """A restarted server does not write into the old log, and the two are not mixed up when read."""
    for run in range(2):
        log = start_log(tmp_path / "log")
        for i in range(3 + run):
            log(float(i), arrival(i), [])
        log.close()
    assert len(list(open_log(tmp_path / "log"))) == 4
    assert len(list(open_log(tmp_path / "log.1.gz"))) == 3


class Held(EventLog):
    """An event log whose writer waits until it is released."""

    def __init__(self, path: Path, buffered_events: int) -> None:
        """Hold the writer from the start."""
        self.go = threading.Event()
        self.writing = threading.Event()
        super().__init__(
            path, header_for(SPECS["least_loaded"]), max_bytes=MB, files=2, buffered_events=buffered_events
        )

    def _write(self, logged: writer.Logged) -> None:
        self.writing.set()
        self.go.wait()
        super()._write(logged)


def test_what_does_not_fit_is_dropped_counted_and_marked(tmp_path: Path) -> None:
    """
    While the writer is stuck, the caller continues; events that do not fit the buffer are counted and marked in the
    log.
    """
    log = Held(tmp_path / "log", buffered_events=5)
    log(0.0, arrival(0), [])
    assert log.writing.wait(10)  # the writer has the first in hand, the buffer is empty
    for i in range(1, 10):
        log(float(i), arrival(i), [])
    assert (log.events, log.dropped) == (10, 4)
    log.go.set()
    log._buffer.put(None)  # not `close`: a second end is never read
    log._thread.join(10)
    log(10.0, arrival(10), [])
    entries = list(open_log(tmp_path / "log"))
    assert [e.n if isinstance(e, LoggedEvent) else (e.count,) for e in entries] == [1, 2, 3, 4, 5, 6, (4,)]
    assert isinstance(entries[-1], Gap)


def test_a_gap_in_the_middle_is_marked_before_what_follows(tmp_path: Path) -> None:
    """Events after a gap have their true numbers, and the gap stands before them."""
    log = Held(tmp_path / "log", buffered_events=2)
    log(0.0, arrival(0), [])
    assert log.writing.wait(10)
    for i in range(1, 6):
        log(float(i), arrival(i), [])
    log.go.set()
    while log._buffer.qsize():
        log.writing.wait(0.001)
    log(6.0, arrival(6), [])
    log.close()
    assert [e.n if isinstance(e, LoggedEvent) else (e.count,) for e in open_log(tmp_path / "log")] == [1, 2, 3, (3,), 7]
    assert log.dropped == 3


def test_a_full_disk_ends_the_log_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the disk fails, the log ends with a message in the server's log; later events count as dropped."""
    log = start_log(tmp_path / "log")

    def fail(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._files, "write", fail)
    log(0.0, arrival(0), [])
    log._thread.join(10)
    log(1.0, arrival(1), [])
    log(2.0, arrival(2), [])
    log.close()
    assert log.dropped >= 2
    assert "serving goes on" in caplog.text
    assert "No space left" in caplog.text


def test_a_value_that_cannot_be_written_costs_its_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An event with a lone surrogate in a name is left out and counted; its neighbours are there."""
    log = start_log(tmp_path / "log")
    log(0.0, arrival(0), [])
    log(1.0, TimerFired("\ud800"), [])
    log(2.0, arrival(2), [])
    log.close()
    assert [e.n if isinstance(e, LoggedEvent) else (e.count,) for e in open_log(tmp_path / "log")] == [1, (1,), 3]
    assert log.dropped == 1
    assert "cannot be written" in caplog.text


def test_prefix_hashes_are_replaced(tmp_path: Path) -> None:
    """Hashes of prompt blocks are replaced: equal ones stay equal within a log, but differ from log to log."""
    hashes = (123_456_789, -5, 1 << 100, 123_456_789)
    seen = []
    for name in ("one", "two"):
        log = start_log(tmp_path / name)
        log(0.0, arrival(0, prefix_hashes=hashes), [])
        log(0.0, arrival(1, prefix_hashes=hashes[:2]), [])
        log.close()
        assert b"123456789" not in (tmp_path / name).read_bytes()
        first, second = [e.event.prefix_hashes for e in open_log(tmp_path / name)]
        assert first[0] == first[3] == second[0]
        assert len(set(first)) == 3
        seen.append(first)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("name", ["missing/log", "."])
def test_unwritable_paths_are_refused(tmp_path: Path, name: str) -> None:
    """A path in a missing folder, or of a folder, is a ConfigError that names the option."""
    with pytest.raises(ConfigError, match="--event-log"):
        start_log(tmp_path / name)
    with (
        pytest.raises(ConfigError, match="--event-log"),
        write_log_file(tmp_path / name, header_for(SPECS["least_loaded"])),
    ):
        raise AssertionError


def test_header_tells_what_a_replay_needs(tmp_path: Path) -> None:
    """The header is one line of JSON with format, schema, version, policy, options and instances."""
    with write_log_file(tmp_path / "log.gz", header_for(SPECS["static_stages"], profile="p")):
        pass
    header = msgspec.json.decode(gzip.decompress((tmp_path / "log.gz").read_bytes()).splitlines()[0])
    assert header["format"] == "cascadeinfer-event-log"
    assert (header["schema_version"], header["policy"], header["profile"]) == (3, "static_stages", "p")
    assert header["options"]["retry_s"] == 0.1
    assert header["instances"] == ["i0", "i1", "i2"]


def modes(folder: Path) -> dict[str, int]:
    """Each file's permission bits."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process's umask."""
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_all_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """The newest, the full and the compressed files have mode 0600, whatever the umask."""
    log = start_log(tmp_path / "log", max_bytes=2000, files=3)
    assert set(modes(tmp_path).values()) == {0o600}
    for i in range(100):
        log(float(i), arrival(i), [])
    log.close()
    with write_log_file(tmp_path / "whole.gz", header_for(SPECS["least_loaded"])):
        assert set(modes(tmp_path).values()) == {0o600}
    assert modes(tmp_path) == dict.fromkeys(("log", "log.1.gz", "log.2.gz", "whole.gz"), 0o600)


def test_a_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is created with mode 0600, so that it is never readable by others, not even briefly."""
    asked: list[int] = []
    real = os.open

    def watched(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if flags & os.O_CREAT:
            asked.append(mode)
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    log = start_log(tmp_path / "log", max_bytes=2000, files=3)
    for i in range(20):
        log(float(i), arrival(i), [])
    log.close()
    assert len(asked) >= 3
    assert set(asked) == {0o600}


def test_files_of_an_earlier_run_are_closed_to_others(tmp_path: Path) -> None:
    """Logs that an earlier version left readable are tightened, also compressed ones; other files are left alone."""
    start_log(tmp_path / "log").close()
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "other").write_bytes(b"")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    start_log(tmp_path / "log").close()
    assert modes(tmp_path) == {"log": 0o600, "log.1.gz": 0o600, "log.2.gz": 0o600, "other": 0o644}


def test_a_readable_file_that_cannot_be_tightened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another owner is not written to: its owner could read along."""
    (tmp_path / "log").touch(0o644)

    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(ConfigError, match="Operation not permitted"):
        start_log(tmp_path / "log")


def test_a_disk_that_is_full_at_a_rotation_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    When a full file cannot be compressed, the log ends and says why; the full file stays, a half compressed one does
    not.
    """

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rotation.shutil, "copyfileobj", fail)
    log = start_log(tmp_path / "log", max_bytes=500, files=3)
    for i in range(20):
        log(float(i), arrival(i), [])
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert log.failure == "No space left on device"
    assert "serving goes on" in caplog.text


def test_a_log_whose_folder_is_deleted_ends_at_the_rotation(tmp_path: Path) -> None:
    """The open file is written to its end; only the next one cannot be created."""
    folder = tmp_path / "logs"
    folder.mkdir()
    log = start_log(folder / "log", max_bytes=500, files=3)
    (folder / "log").unlink()
    folder.rmdir()
    for i in range(20):
        log(float(i), arrival(i), [])
    log.close()
    assert log.failure == "No such file or directory"


def test_an_unwritten_log_counts() -> None:
    """A process that serves without its log counts every event as missing."""
    log = UnwrittenLog("No space left on device")
    log(0.0, arrival(0), [])
    log(1.0, arrival(1), [])
    log.close()
    assert (log.events, log.dropped, log.failure) == (2, 2, "No space left on device")
