"""Reading damaged event logs: the error names file and line, or the log is read as far as it goes."""

import gzip
from pathlib import Path

import pytest
from log_files import SPECS, lines_of, simulated_log, write_lines

from cascadeinfer.core.errors import EventLogError
from cascadeinfer.eventlog.reader import open_log


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short, undamaged log."""
    path = tmp_path_factory.mktemp("log") / "good.jsonl"
    simulated_log(path, SPECS["static_stages"], requests=20)
    return path


def read(path: Path) -> tuple[int, list[str]]:
    """How many events a log has, and its notes."""
    log = open_log(path)
    return sum(1 for _ in log), log.notes


def test_a_whole_log_has_nothing_to_note(good: Path) -> None:
    """A properly closed log is read without a note, any number of times."""
    n = len(lines_of(good)) - 2
    log = open_log(good)
    assert [sum(1 for _ in log), sum(1 for _ in log)] == [n, n]
    assert not log.notes


@pytest.mark.parametrize("cut_bytes", [1, 20])
def test_a_line_cut_short_at_the_end_is_noted(good: Path, tmp_path: Path, cut_bytes: int) -> None:
    """After a crash the last line may be cut: all before it is read, and the note names the line."""
    lines = lines_of(good)[:10]
    cut = write_lines(tmp_path / "cut", [*lines[:-1], lines[-1][:-cut_bytes]])
    n, notes = read(cut)
    assert n == 8
    assert notes == [f"{cut}, line 10: the file breaks off here; its writer was killed, or is writing"]


def test_a_log_without_its_last_line_is_noted(good: Path, tmp_path: Path) -> None:
    """A log that ends between two lines without an end marker was still being written."""
    n, notes = read(write_lines(tmp_path / "open", lines_of(good)[:10]))
    assert n == 9
    assert "no last line" in notes[0]


def test_compressed_logs_are_read_by_content(good: Path, tmp_path: Path) -> None:
    """A compressed log is read whatever its name, and as far as it goes if it is truncated."""
    packed = gzip.compress(good.read_bytes())
    whole = write_lines(tmp_path / "packed.jsonl", [packed])
    assert read(whole) == read(good)
    half = write_lines(tmp_path / "half.gz", [packed[: len(packed) // 2]])
    n, notes = read(half)
    assert 0 < n < len(lines_of(good))
    assert f"line {n + 2}: the file breaks off" in notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:4], b"garbage\n", *lines[4:]], r"line 5: no line of an event log: .*'garbage'"),
        (lambda lines: [*lines[:4], b"\xff\xfe\n", *lines[4:]], r"line 5: no line of an event log"),
        (lambda lines: [*lines[:4], b'{"line":"event"}\n', *lines[4:]], r"line 5: .*missing required field"),
        (lambda lines: [*lines[:4], *lines[5:]], r"line 5: event 5 follows event 3: lines are missing"),
        (lambda lines: [*lines[:4], lines[0], *lines[4:]], r"line 5: a second header"),
        (lambda lines: [*lines, lines[4]], r"a line after the last one"),
        (lambda lines: lines[1:], r"line 1: not an event log"),
        (lambda _: [b"PK\x03\x04 anything"], r"line 1: not an event log"),
        (lambda _: [], r"line 1: not an event log"),
        (lambda _: [b"\x1f\x8b\x08\x00garbage of a gzip"], r"cannot be read"),
        (
            lambda lines: [lines[0].replace(b'"schema_version":3', b'"schema_version":4'), *lines[1:]],
            r"line 1: schema 4 of .*; this program reads 2 to 3",
        ),
        (
            lambda lines: [lines[0].replace(b'"schema_version":3', b'"schema_version":1'), *lines[1:]],
            r"line 1: schema 1 of .*; this program reads 2 to 3: replay it with the version that wrote it",
        ),
        (
            lambda lines: [lines[0].replace(b'"run":', b'"ran":'), *lines[1:]],
            r"line 1: Object contains unknown field `ran`",
        ),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"[0,60]", b"[0,0]"), *lines[3:]],
            r"line 3: length range \[0, 0\) is empty",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(good: Path, tmp_path: Path, change: object, message: str) -> None:
    """Garbage, missing or doubled lines, foreign files, newer and older schemas are errors that name file and line."""
    bad = write_lines(tmp_path / "bad", change(lines_of(good)))  # type: ignore[operator]
    with pytest.raises(EventLogError, match=message) as raised:
        read(bad)
    assert str(bad) in str(raised.value)


def test_no_file_is_told(tmp_path: Path) -> None:
    """A missing file is an error that names it."""
    with pytest.raises(EventLogError, match="nothing"):
        open_log(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"policy":"static_stages"', b'"policy":"magic"', "no policy 'magic'"),
        (b'"retry_s":0.1', b'"retry_hours":0.1', "no option retry_hours"),
        (b'"retry_s":0.1', b'"retry_s":"soon"', "option retry_s: "),
        (b"[0,60]", b"[0,61]", "overlap between stages"),
    ],
)
def test_unknown_policies_and_options_are_told(
    good: Path, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    """A policy or option that this version lacks, or inconsistent options, are errors of line 1."""
    lines = lines_of(good)
    assert old in lines[0]
    log = open_log(write_lines(tmp_path / "other", [lines[0].replace(old, new), *lines[1:]]))
    with pytest.raises(EventLogError, match=rf"line 1: .*{message}"):
        log.spec()
