"""A server's process: ready, dead, deaf to SIGTERM, with children that outlive it. The servers are small programs."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cascadeinfer.cluster.local import free_port
from cascadeinfer.loadgen.served_process import ServedProcess, ServerFailedError

WEB = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/known" else 404)
        self.end_headers()
        self.wfile.write(b"hello")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdin=subprocess.PIPE, \
start_new_session="apart" in sys.argv)
print(child.pid, flush=True)
if "ends" not in sys.argv:
    time.sleep(600)
"""
SLEEPER = "import time; time.sleep(600)"
LAST_WILL = "import sys; sys.stdin.read(); open({path!r}, 'w').write('done')"
LIMIT_S = 60.0

Make = Callable[..., ServedProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Creates a server from a program; all are killed at the end."""
    made: list[ServedProcess] = []

    def make_one(program: str, *words: str, **options: Any) -> ServedProcess:
        port = free_port()
        command = [sys.executable, "-c", program, str(port), *words]
        made.append(ServedProcess(command, port=port, log=tmp_path / "log", **options))
        return made[-1]

    yield make_one
    for server in made:
        server.stop()


def has_said_something(server: ServedProcess) -> None:
    """Wait until the log has a line."""
    server.wait_until(lambda: server.log.read_text().endswith("\n"), "anything said", LIMIT_S, poll_s=0.01)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_serves_until_the_block_ends(make: Make) -> None:
    """Ready means status 200; pages come as text, other statuses as errors; SIGTERM at the end of the block ends it."""
    server = make(WEB)
    with server:
        assert server.wait_ready("/known", LIMIT_S) >= 0.0
        assert server.page("/known") == "hello"
        assert not server.answers("/unknown")
        with pytest.raises(ServerFailedError, match="the server answers /unknown with 404"):
            server.page("/unknown")
        assert [process.pid for process in server.family()] == [server.pid]
    assert server.exit_code == -signal.SIGTERM
    assert server.family() == []


def test_a_server_that_dies_while_starting(make: Make) -> None:
    """Waiting ends at once, with the exit code and the log's last lines, however long it might have waited."""
    server = make("import sys; print('no such model'); sys.exit(3)", name="the router")
    server.start()
    with pytest.raises(ServerFailedError) as caught:
        server.wait_ready("/known", float("inf"))
    assert caught.value.reason == "the router ended with exit code 3"
    assert caught.value.log_tail == "no such model"
    assert str(caught.value) == f"the router ended with exit code 3; the end of {server.log}:\nno such model"
    assert server.stop() == 3


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    """A command that cannot be started raises the same kind of error, and stopping it is harmless."""
    server = ServedProcess(["/no/such/program"], port=1, log=tmp_path / "log")
    with pytest.raises(ServerFailedError, match=r"the server cannot be started: .*No such file"):
        server.start()
    assert server.stop() is None


def test_a_server_that_is_never_ready(make: Make) -> None:
    """The error names what was awaited."""
    server = make(DEAF)
    server.start()
    with pytest.raises(ServerFailedError, match="the server: not ready after 0 s"):
        server.wait_ready("/known", 0.0)
    with pytest.raises(ServerFailedError, match="has not ended within 0 s"):
        server.wait_ended(0.0)


def test_a_page_of_a_server_that_has_gone(make: Make) -> None:
    """A request to a dead server reports that the server has ended, not that the connection was refused."""
    server = make("")
    server.start()
    assert server.wait_ended(LIMIT_S) == 0
    for ask in (server.page, server.answers):
        with pytest.raises(ServerFailedError, match="ended with exit code 0"):
            ask("/known")


def test_a_server_that_ignores_sigterm_is_killed(make: Make) -> None:
    """After the limit it is killed; stopping it again changes nothing."""
    server = make(DEAF, stop_timeout_s=0.1)
    server.start()
    has_said_something(server)
    assert server.stop() == -signal.SIGKILL
    assert server.stop() == -signal.SIGKILL


def test_impatience_ends_the_waiting_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the time that the server has to end reaches the caller once the server has been killed."""
    server = make(DEAF)
    server.start()
    has_said_something(server)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_end_in_good_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert server.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("words", [(), ("apart",), ("ends",)], ids=["in its group", "in another session", "orphaned"])
def test_children_left_behind_are_killed(make: Make, words: tuple[str, ...]) -> None:
    """All that the server has started ends with it: in its group, in another session, or orphaned long ago."""
    server = make(PARENT, SLEEPER, *words, children_timeout_s=0.0)
    server.start()
    has_said_something(server)
    child = int(server.log_tail())
    if "ends" in words:
        server.wait_ended(LIMIT_S)
    assert child in [process.pid for process in server.family()]
    server.stop()
    assert not is_running(child)


def test_children_may_finish(make: Make, tmp_path: Path) -> None:
    """A child that ends after its parent, such as one that removes shared memory, gets the time for its work."""
    path = tmp_path / "will"
    server = make(PARENT, LAST_WILL.format(path=str(path)), children_timeout_s=LIMIT_S)
    server.start()
    has_said_something(server)
    assert server.stop() == -signal.SIGTERM
    assert path.read_text() == "done"


def test_kill_ends_the_whole_group(make: Make) -> None:
    """No process of the group gets any time."""
    server = make(PARENT, SLEEPER)
    server.start()
    has_said_something(server)
    server.kill()
    assert server.wait_ended(LIMIT_S) == -signal.SIGKILL
    assert not is_running(int(server.log_tail()))


@pytest.mark.parametrize("own_session", [True, False])
def test_session_and_group(make: Make, *, own_session: bool) -> None:
    """The group is always new; the session is new or the caller's."""
    server = make(DEAF, own_session=own_session)
    server.start()
    assert os.getpgid(server.pid) == server.pid
    assert os.getsid(server.pid) == (server.pid if own_session else os.getsid(0))


def test_the_environment_is_added_to(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has this process's environment and the variables that it is given."""
    monkeypatch.setenv("OURS", "1")
    server = make("import os; print(os.environ['OURS'], os.environ['ITS'])", environment={"ITS": "2"})
    server.start()
    server.wait_ended(LIMIT_S)
    assert server.log_tail() == "1 2"
