"""The file of samples: its content survives an interruption and belongs to one engine."""

import errno
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiled_engine import IDENTITY

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.profiling.log import BatchRun, Header, MeasuredStep, PullRun, SampleLog

HEADER = Header(
    log_version=1, engine=IDENTITY, kv_blocks=10, max_num_seqs=4, max_batched_tokens=64, max_model_tokens=256
)
RUN = BatchRun(kind="decode 1 x 16", round=0, wall_s=0.5, steps=[MeasuredStep(1, 17, 17, 0, 0.0, 0.01)])
PULL = PullRun(pulled_tokens=100, pull_s=0.02)


def written(path: Path, *runs: BatchRun | PullRun) -> bytes:
    """Write these runs to a log; returns its bytes."""
    with SampleLog(path) as log:
        log.open(HEADER)
        for run in runs:
            log.add_pull(run) if isinstance(run, PullRun) else log.add(run)
    return path.read_bytes()


def read(path: Path, header: Header = HEADER) -> SampleLog:
    """The log as a later run finds it."""
    log = SampleLog(path)
    log.open(header)
    log.close()
    return log


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    """Batches and transfers are read back unchanged, and more can be added."""
    path = tmp_path / "p.samples.jsonl"
    written(path, RUN, PULL)
    with SampleLog(path) as log:
        log.open(HEADER)
        log.add(RUN)
    assert read(path).runs == [RUN, RUN]
    assert read(path).pulls == [PULL]


@given(st.integers(0, 400))
def test_a_cut_file_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Wherever the end of the file is lost, the runs before it are kept, and the next one is whole."""
    path = tmp_path_factory.mktemp("cut") / "p.samples.jsonl"
    raw = written(path, RUN, RUN, RUN)
    header_ends = raw.index(b"\n") + 1
    left = raw[: max(header_ends, len(raw) - cut)]
    path.write_bytes(left)
    whole = left.count(b"\n") - 1
    with SampleLog(path) as log:
        log.open(HEADER)
        assert log.runs == [RUN] * whole
        log.add(RUN)
    assert read(path).runs == [RUN] * (whole + 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (msgspec.structs.replace(HEADER, engine=msgspec.structs.replace(IDENTITY, layers=80)), "layers: 2 .*80"),
        (msgspec.structs.replace(HEADER, engine=msgspec.structs.replace(IDENTITY, eager=False)), "eager: True"),
        (msgspec.structs.replace(HEADER, max_model_tokens=512), "max_model_tokens: 256 then, 512 now"),
    ],
)
def test_steps_of_another_engine_are_refused(tmp_path: Path, header: Header, message: str) -> None:
    """Continuing with another model's steps or another configuration is an error that names the difference."""
    written(tmp_path / "p.samples.jsonl", RUN)
    with pytest.raises(ConfigError, match=f"--resume: .*of another engine .*{message}"):
        read(tmp_path / "p.samples.jsonl", header)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is no log is neither used nor overwritten."""
    path = tmp_path / "p.samples.jsonl"
    path.write_text("dear diary\n")
    with pytest.raises(ConfigError, match="no file of steps"):
        read(path)
    assert path.read_text() == "dear diary\n"


def test_resume_has_to_be_asked_for(tmp_path: Path) -> None:
    """Existing steps are neither overwritten nor added to unless requested; requesting that without any is an error."""
    path = tmp_path / "p.samples.jsonl"
    with pytest.raises(ConfigError, match="--resume: there are no steps"):
        SampleLog(path).check(resume=True)
    SampleLog(path).check(resume=False)
    assert not path.exists()
    written(path, RUN)
    with pytest.raises(ConfigError, match=r"--output: .*earlier run .*--resume"):
        SampleLog(path).check(resume=False)
    SampleLog(path).check(resume=True)
    assert read(path).runs == [RUN]


def test_a_file_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    """The check before the measurement tries to write."""
    with pytest.raises(ConfigError, match=r"--output: .*cannot be written"):
        SampleLog(tmp_path / "no" / "p.samples.jsonl").check(resume=False)


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the run with a message on how to continue; the log can still be read."""
    log = SampleLog(tmp_path / "p.samples.jsonl")
    log.open(HEADER)
    log.add(RUN)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ConfigError, match=r"No space left on device; 1 batches are kept .*--resume"):
            log.add(RUN)
    log.close()
    assert log.runs == [RUN]
    assert read(log.path).runs == [RUN]


@pytest.mark.parametrize("function", ["open", "write"])
def test_a_disk_that_has_no_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A file that cannot be created or begun is a ConfigError that names option and file, and is not left behind."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "p.samples.jsonl"
    with monkeypatch.context() as patch, SampleLog(path) as log:
        patch.setattr(os, function, fail)
        with pytest.raises(ConfigError, match=r"--output: .*p\.samples\.jsonl cannot be written: No space left"):
            log.open(HEADER)
    assert list(tmp_path.iterdir()) == []
