"""Output files are checked before the work, and written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.results.output_files import check_output, replacing


def write_half(path: Path, error: BaseException) -> None:
    """Begin to write, then fail."""
    with replacing(path, "--json") as beside:
        beside.write_text("half of")
        raise error


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """A folder, a file in a missing folder, a file below a file are refused; a check that passes leaves nothing."""
    (tmp_path / "file").write_text("before")
    with pytest.raises(ConfigError, match=r"--json: .* is a folder"):
        check_output(tmp_path, "--json")
    for nowhere in (tmp_path / "none" / "x.json", tmp_path / "file" / "x.json"):
        with pytest.raises(ConfigError, match="--json: there is no folder"):
            check_output(nowhere, "--json")
    check_output(tmp_path / "file", "--json")
    check_output(tmp_path / "new", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_there_survives_a_failure(tmp_path: Path) -> None:
    """When writing fails half-way, or the work raises, the old content stays, and no part of the new one is left."""
    path = tmp_path / "out.json"
    path.write_text("before")
    with pytest.raises(ConfigError, match=r"--json: cannot write .*No space left"):
        write_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path, "--json") as beside:
        beside.write_text("after")
    assert path.read_text() == "after"


def test_a_pipe_gets_the_whole_content(tmp_path: Path) -> None:
    """What cannot be renamed over is written at the end, and never passed to a writer that might remove it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_output(pipe, "--json")
        with replacing(pipe, "--json") as beside:
            assert beside != pipe
            beside.write_text("all of it")
        assert os.read(reader, 100) == b"all of it"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
