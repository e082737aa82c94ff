"""Named fleets: one user at a time, found again, never anybody else's."""

import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeinfer.cluster.fleet import Fleet, Record, Update, folder_of, names, user_of
from cascadeinfer.core.errors import ConfigError

RECORD = Record("0.1.0", "0.32.0", "a/model", {"--max-model-len": "4096"})


@pytest.fixture
def base() -> Iterator[Path]:
    """Where fleets are; short, for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="cf") as made:
        yield Path(made)


@contextmanager
def used_elsewhere(base: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process uses the fleet `a` (a POSIX lock does not keep its own process out)."""
    script = (
        "import sys; from pathlib import Path; from cascadeinfer.cluster.fleet import Fleet; "
        f"fleet = Fleet.take('a', Path({str(base)!r})); print('taken', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_server_at_a_time(base: Path) -> None:
    """The second is told who has it; a killed one does not hold it."""
    with used_elsewhere(base) as other:
        assert user_of("a", base) == other.pid
        with pytest.raises(ConfigError, match=rf"--fleet: the server with process id {other.pid} uses a already"):
            Fleet.take("a", base)
        other.kill()
        other.wait()
        fleet = Fleet.take("a", base, wait=True)
    fleet.leave()
    fleet.leave()
    assert user_of("a", base) is None
    assert user_of("b", base) is None


def test_what_it_keeps(base: Path) -> None:
    """Record and key are there for the next server, and for nobody else."""
    fleet = Fleet.take("a", base)
    assert fleet.record() is None
    fleet.write(RECORD)
    key = fleet.key()
    fleet.leave()
    again = Fleet.take("a", base)
    assert again.record() == RECORD
    assert again.key() == key
    for path in again.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert names(base) == ["a"]
    again.remove()
    assert names(base) == []


def test_a_record_that_cannot_be_read(base: Path) -> None:
    """Of another version, or cut off: one line with the way out."""
    fleet = Fleet.take("a", base)
    (fleet.path / "record").write_text('{"version": 1')
    with pytest.raises(ConfigError, match=r"cannot be read.*cascadeinfer stop a"):
        fleet.record()
    fleet.remove()


def test_differences_in_words() -> None:
    """Every one, in the operator's words."""
    asked = Record("0.2.0", "0.32.0", "b/model", {"--dtype": "float32"})
    assert RECORD.differences(asked) == [
        "cascadeinfer is 0.1.0, not 0.2.0",
        "the model is a/model, not b/model",
        "--dtype is its default, not float32",
        "--max-model-len is 4096, not its default",
    ]
    assert RECORD.differences(RECORD) == []


def test_an_unfinished_update_is_told(base: Path) -> None:
    """The record of it is read back; it differs from a server's options in those that the server does not share."""
    unfinished = msgspec.structs.replace(RECORD, updates=(Update(("--max-num-seqs 8", "--dtype half"), "ab"),))
    assert RECORD.unfinished == ""
    assert unfinished.unfinished == "the options before and --max-num-seqs 8 --dtype half"
    fleet = Fleet.take("a", base)
    fleet.write(unfinished)
    assert fleet.record() == unfinished
    fleet.remove()
    asked = Record(RECORD.version, RECORD.vllm, "b/model", {"--dtype": "half"})
    assert unfinished.differences(RECORD) == []
    assert unfinished.differences(asked, {"the model", "--dtype"}) == ["--max-model-len is 4096, not its default"]


@given(st.dictionaries(st.sampled_from(["--a", "--b", "--c"]), st.sampled_from("xyz")))
def test_no_difference_is_overlooked(options: dict[str, str]) -> None:
    """Two records differ in words if and only if they differ."""
    other = Record(RECORD.version, RECORD.vllm, RECORD.model, options)
    assert bool(RECORD.differences(other)) == (options != RECORD.options)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a b", "x" * 33])
def test_what_is_no_name(name: str, base: Path) -> None:
    """It would be a path."""
    with pytest.raises(ConfigError, match="is no name of a fleet"):
        Fleet.take(name, base)


def test_a_folder_that_others_can_enter(base: Path) -> None:
    """Nor through a link: whoever has made it could read the key."""
    fleets = folder_of("a", base).parent
    fleets.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not a folder of this user alone"):
        Fleet.take("a", base)
    fleets.rmdir()
    elsewhere = base / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    fleets.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="not a folder of this user alone"):
        Fleet.take("a", base)


def test_a_base_that_is_too_long(base: Path) -> None:
    """Names of sockets have a limit."""
    with pytest.raises(ConfigError, match="too long for the names of sockets"):
        Fleet.take("a", base / ("x" * 80))
    assert not any(base.iterdir())


def test_a_server_that_stands_by_while_the_fleet_is_stopped(base: Path) -> None:
    """It takes over a new fleet of the same name, and not a folder that is gone."""
    with used_elsewhere(base) as other, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(Fleet.take, "a", base, wait=True)
        shutil.rmtree(folder_of("a", base), ignore_errors=True)  # as a stop does; the other may be making it anew
        other.kill()
        fleet = waiting.result(60)
    assert fleet.path.exists()
    fleet.write(RECORD)
    fleet.remove()
