"""A running server's folder is private; it is swept if its server was killed, but never while the server lives."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascadeinfer.cluster import runtime_folder as module
from cascadeinfer.cluster.process_start import ProcessStart
from cascadeinfer.cluster.runtime_folder import (
    LOCK,
    SOCKETS_VARIABLE,
    RuntimeFolder,
    instance_environment,
    instance_folder,
    runtime_folder,
    sweep,
)
from cascadeinfer.core.errors import ConfigError

SERVER = r"""
import sys, os, time
from cascadeinfer.cluster.runtime_folder import runtime_folder, instance_folder
with runtime_folder() as folder:
    (instance_folder() / "socket").touch()
    if "--fork" in sys.argv and os.fork() == 0:
        os.write(1, f"child {os.getpid()}\n".encode())
        time.sleep(600)
    os.write(1, f"server {folder.path}\n".encode())
    sys.stdin.read()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A short temporary path, because socket paths are limited in length."""
    with tempfile.TemporaryDirectory(prefix="rf", dir="/tmp") as folder:
        yield Path(folder)


def start(base: Path, *words: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """A process with a folder, and what it printed about itself and its child."""
    environment = {**os.environ, "TMPDIR": str(base)}
    environment.pop(SOCKETS_VARIABLE, None)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    said = dict(process.stdout.readline().split() for _ in range(1 + len(words)))
    return process, said


def end(process: subprocess.Popen[str], *, kill: bool) -> None:
    """Let it exit cleanly, or kill it."""
    if kill:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("kill", [False, True], ids=["leaves", "killed"])
def test_nothing_is_left_and_nobody_else_is_touched(base: Path, kill: bool) -> None:
    """A folder is removed with its server or at the next start; another server's stays, even while two start."""
    first, said = start(base)
    other, others = start(base)
    assert stat.S_IMODE(Path(said["server"]).stat().st_mode) == 0o700
    end(first, kill=kill)
    assert Path(said["server"]).exists() == kill
    assert [str(path) for path in sweep(base)] == [said["server"]] * kill
    assert [str(path) for path in base.iterdir()] == [others["server"]]
    assert len(list(Path(others["server"]).rglob("socket"))) == 1
    end(other, kill=False)
    assert not list(base.iterdir())


def test_an_orphan_holds_no_lock_and_drops_none(base: Path) -> None:
    """A forked child does not keep its killed server's folder, and its exit does not free a live server's."""
    server, said = start(base, "--fork")
    os.kill(int(said["child"]), signal.SIGKILL)
    assert sweep(base) == []
    end(server, kill=False)
    server, said = start(base, "--fork")
    server.kill()
    server.wait()
    try:
        assert [str(path) for path in sweep(base)] == [said["server"]]
    finally:
        os.kill(int(said["child"]), signal.SIGKILL)
    server.communicate()


def remnant(base: Path, name: str = "cascadeinfer-abcdefgh") -> Path:
    """What a killed server leaves."""
    folder = base / name
    folder.mkdir(mode=0o700)
    (folder / LOCK).touch()
    (folder / "i0").mkdir()
    (folder / "i0" / "socket").touch()
    return folder


@pytest.mark.parametrize(
    "name", ["cascadeinfer-metrics-abcdefgh", "cascadeinfer-demo", "other-abcdefgh", "cascadeinfer-"]
)
def test_other_names_stay(base: Path, name: str) -> None:
    """Only folders named like ours are considered."""
    folder = remnant(base, name)
    assert sweep(base) == []
    assert folder.exists()


def test_another_users_folder_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's folder stays, whatever its name and its lock."""
    folder = remnant(base)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep(base) == []
    assert folder.exists()


def test_links_are_not_followed(base: Path) -> None:
    """No symbolic link leads outside: not as the folder, not as its lock, and not inside it."""
    precious = base / "precious"
    precious.mkdir()
    (precious / LOCK).touch()
    (precious / "file").touch()
    (base / "cascadeinfer-linklink").symlink_to(precious)
    folder = remnant(base, "cascadeinfer-linklock")
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(precious / "file")
    inner = remnant(base, "cascadeinfer-linkfile")
    (inner / "metrics").symlink_to(precious)
    (inner / "i0" / "out").symlink_to(precious)
    assert sweep(base) == [inner]
    assert sorted(path.name for path in precious.iterdir()) == ["file", LOCK]


def test_a_folder_without_a_lock_is_a_newborns_at_first(base: Path) -> None:
    """Without a lock, an empty folder counts as a starting server's for a while; one with contents is never removed."""
    newborn, old, full = (base / f"cascadeinfer-{name}" for name in ("newborn0", "oldold00", "fullfull"))
    for folder in (newborn, old, full):
        folder.mkdir()
    (full / "something").touch()
    for folder in (old, full):
        os.utime(folder, (0, 0))
    assert sweep(base) == [old]
    assert newborn.exists()
    assert full.exists()


def test_two_starts_meet(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose folder is swept before it is locked makes another one."""
    real = os.open
    swept: list[Path] = []

    def slow(path: str | Path, flags: int, mode: int = 0o777, **more: int) -> int:
        descriptor = real(path, flags, mode, **more)
        if Path(path).name == LOCK and not swept:  # made but not yet locked: another server starts
            swept.append(Path(path).parent)
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    (
                        "from pathlib import Path; from cascadeinfer.cluster.runtime_folder import sweep; "
                        f"sweep(Path({str(base)!r}))"
                    ),
                ],
                check=True,
            )
        return descriptor

    monkeypatch.setattr(module.os, "open", slow)
    folder = RuntimeFolder.create(base)
    assert [folder.path] == list(base.iterdir())
    assert folder.path != swept[0]
    folder.remove()
    folder.remove()
    assert not list(base.iterdir())


def test_a_cleared_temporary_folder_does_no_harm(base: Path) -> None:
    """A server exits cleanly even if its folder has been removed."""
    folder = RuntimeFolder.create(base)
    (folder.path / LOCK).unlink()
    folder.path.rmdir()
    folder.remove()


def test_an_interrupted_sweep_is_taken_up_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is removed last."""
    folder = remnant(base)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert sweep(base) == []
    assert (folder / LOCK).exists()
    assert sweep(base) == [folder]


def test_variables_point_into_the_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds vLLM's sockets and an instance's temporary files; afterwards the operator's settings apply again."""
    monkeypatch.setenv(SOCKETS_VARIABLE, str(base))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with runtime_folder() as folder:
        assert os.environ[SOCKETS_VARIABLE] == str(folder.path)
        instance = instance_folder()
        assert instance.parent == folder.path
        environment = instance_environment(instance)
        assert environment[SOCKETS_VARIABLE] == environment["TMPDIR"] == str(instance)
        assert not environment["TORCHINDUCTOR_CACHE_DIR"].startswith(str(folder.path))
    assert os.environ[SOCKETS_VARIABLE] == str(base)
    assert not list(base.iterdir())


def test_instances_that_start_together_have_folders_beside_each_other(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested, the second would go with the first: once the first had died, no front end could attach to the second."""
    monkeypatch.setenv(SOCKETS_VARIABLE, str(base))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with runtime_folder() as folder:
        first = instance_folder()
        of_first = instance_environment(first)
        with ProcessStart(of_first):
            second = instance_folder()
            assert second.parent == first.parent == folder.path
            of_second = instance_environment(second)
        assert of_second.keys() == of_first.keys()


@pytest.mark.parametrize(("name", "message"), [("x" * 60, "too long"), ("missing", "No such file")])
def test_a_bad_place_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    """The error is one line that names the variable, before anything is started."""
    monkeypatch.setenv(SOCKETS_VARIABLE, str(base / name))
    with pytest.raises(ConfigError, match=message) as refused, runtime_folder():
        raise AssertionError
    assert SOCKETS_VARIABLE in str(refused.value)
