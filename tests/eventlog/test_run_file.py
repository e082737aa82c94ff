"""The event log of a simulation: whole, or up to where the run failed, or not there at all, but never half a file."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from log_files import SPECS, arrival, header_for

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.eventlog import run_file
from cascadeinfer.eventlog.reader import open_log
from cascadeinfer.eventlog.run_file import write_log_file

HEADER = header_for(SPECS["least_loaded"])
NAMES = pytest.mark.parametrize("name", ["log", "log.gz"])


class SmallDisk(io.FileIO):
    """A file on a disk with room for a number of bytes."""

    room_bytes = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Fail once they are used up."""
        if self.tell() + len(data) > self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def put_on_small_disk(monkeypatch: pytest.MonkeyPatch, room_bytes: int) -> None:
    """From now on, logs are written to a nearly full disk, through a buffer as usual."""
    monkeypatch.setattr(SmallDisk, "room_bytes", room_bytes)

    def opened(path: Path, mode: str, opener: Callable[[str, int], int]) -> io.BufferedWriter:
        return io.BufferedWriter(SmallDisk(path, mode.rstrip("b"), opener=opener))

    monkeypatch.setattr(run_file, "open", opened, raising=False)


def write_events(path: Path, count: int) -> None:
    """A log of this many events."""
    with write_log_file(path, HEADER) as write:
        for number in range(count):
            write(float(number), arrival(number), [])


@NAMES
@pytest.mark.parametrize("count", [0, 10_000], ids=["at the end", "in the middle"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Whether the disk fills at some event or at the last bytes, the error names option and file; no file is left."""
    put_on_small_disk(monkeypatch, room_bytes=50)
    with pytest.raises(ConfigError) as caught:
        write_events(tmp_path / name, count)
    assert str(caught.value).startswith(
        f"--event-log: cannot write {tmp_path / name}: No space left on device (make room"
    )
    assert list(tmp_path.iterdir()) == []


@NAMES
def test_an_earlier_log_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The earlier log is unchanged."""
    write_events(tmp_path / name, 3)
    before = (tmp_path / name).read_bytes()
    put_on_small_disk(monkeypatch, room_bytes=50)
    with pytest.raises(ConfigError, match="--event-log"):
        write_events(tmp_path / name, 100)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that permission was denied."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(run_file, "open", refused, raising=False)
    with pytest.raises(ConfigError, match=r"--event-log: cannot write .*/log: Permission denied"):
        write_events(tmp_path / "log", 1)
    assert list(tmp_path.iterdir()) == []


@NAMES
def test_a_run_that_breaks_off_leaves_its_events(tmp_path: Path, name: str) -> None:
    """The run's exception reaches the caller; the log holds what led to it, and readers are told that it is cut off."""
    with pytest.raises(ZeroDivisionError), write_log_file(tmp_path / name, HEADER) as write:  # noqa: PT012 - that is the run
        write(0.0, arrival(0), [])
        write(1.0, arrival(1), [])
        _ = 1 / 0
    log = open_log(tmp_path / name)
    assert [entry.at_s for entry in log] == [0.0, 1.0]
    assert log.notes
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    """Events go directly into the pipe, and the pipe is not replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_events(pipe, 2)
        assert os.read(reader, 100_000).count(b"\n") == 4
    finally:
        os.close(reader)
    assert pipe.is_fifo()
