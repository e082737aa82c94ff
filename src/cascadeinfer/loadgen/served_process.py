"""
A server in its own process, for code that starts one and sends it requests: the demo, the tests, the benchmarks.

The command may be any that serves HTTP on the loopback, ours or another system's. Its output goes to a file, and every
error includes the end of it. The process leads its own session, so that Ctrl-C in a terminal reaches only the program
that started it, which then stops it in good order, and so that everything the server has started can be found, and
killed, by its group. A measurement may need the server in the load generator's session instead, because Linux divides a
core among sessions first (autogroup); the process then still has its own process group.
"""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final, Self

import psutil

from cascadeinfer.cluster.local import LOOPBACK
from cascadeinfer.core.errors import CascadeError

STOP_TIMEOUT_S: Final = 30.0
CHILDREN_TIMEOUT_S: Final = 10.0
"""Time for the server's children to end after it; Python's resource tracker, for one, still removes shared memory."""
POLL_S: Final = 0.25
KILLED_TIMEOUT_S: Final = 5.0
"""A signal arrives at once, but memory must be freed, and a process inside a device call ends only after it."""
ENDING_POLL_S: Final = 0.02
HTTP_TIMEOUT_S: Final = 10.0
TAIL_LINES: Final = 25


class ServerFailedError(CascadeError):
    """
    A server did not start, has ended, or does not answer.

    Attributes:
        reason: What happened, in one line.
        log: File with the server's output.
        log_tail: Its last lines.
    """

    def __init__(self, reason: str, *, log: Path, log_tail: str) -> None:
        self.reason = reason
        self.log = log
        self.log_tail = log_tail
        super().__init__(f"{reason}; the end of {log}:\n{log_tail}")


class ServedProcess:
    """
    A server process. See the module header. As a context manager it is started on entry and stopped on exit.

    Attributes:
        command: Program and arguments.
        port: Port on the loopback.
        log: File for the output.
        name: The server's name in errors.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        name: str = "the server",
        environment: Mapping[str, str] | None = None,
        own_session: bool = True,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        children_timeout_s: float = CHILDREN_TIMEOUT_S,
    ) -> None:
        """
        Nothing is started yet.

        Args:
            command: Program and arguments.
            port: Port on which the command serves; the command itself must set it.
            log: File for the output; its contents are replaced.
            name: The server's name in errors.
            environment: Added to this process's own.
            own_session: See the module header.
            stop_timeout_s: How long `stop` waits after SIGTERM.
            children_timeout_s: How long `stop` then waits for the processes that the server has started.
        """
        self.command = list(command)
        self.port = port
        self.log = log
        self.name = name
        self._environment = dict(environment or {})
        self._own_session = own_session
        self._stop_timeout_s = stop_timeout_s
        self._children_timeout_s = children_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._root: psutil.Process | None = None
        self._is_stopped = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- the process -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, once. Raises ServerFailedError if there is no such program."""
        assert self._process is None, "it has been started"
        with self.log.open("wb") as output:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the caller's own command line
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._environment},
                    start_new_session=self._own_session,
                    process_group=None if self._own_session else 0,
                )
            except OSError as error:
                raise self.failure(f"{self.name} cannot be started: {error}") from error
        self._root = psutil.Process(self._process.pid)  # distinguishes it from a later process with the same id

    @property
    def pid(self) -> int:
        """The id of the process and of its group."""
        return self._started().pid

    @property
    def exit_code(self) -> int | None:
        """None while the process runs; minus the signal's number if a signal ended it."""
        return self._started().poll()

    def check_alive(self) -> None:
        """Raise ServerFailedError if the process has ended."""
        if (code := self.exit_code) is not None:
            raise self.failure(f"{self.name} ended with exit code {code}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        self._started().send_signal(number)

    def family(self) -> list[psutil.Process]:
        """
        The living processes of the server: itself, its descendants, and all others in its group or session.

        Returns:
            The process itself first. The others in its group or session are those whose parents have ended.
        """
        assert self._root is not None, "start it first"
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            found = {process.pid: process for process in (self._root, *self._root.children(recursive=True))}
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if pid not in found and self.pid in (os.getpgid(pid), os.getsid(pid)):
                    found[pid] = psutil.Process(pid)
        return _living(found.values())

    def wait_ended(self, timeout_s: float) -> int:
        """
        Wait for the process to end by itself.

        Returns:
            Its exit code.

        Raises:
            ServerFailedError: It has not ended in time.
        """
        try:
            return self._started().wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"{self.name} has not ended within {timeout_s:g} s") from None

    def kill(self) -> None:
        """Kill the process and everything it has started."""
        self._kill(self.family())

    def stop(self) -> int | None:
        """
        Send SIGTERM, wait for the server and its children, then SIGKILL what is left.

        May be called at any time and repeatedly. An exception in the meantime, such as KeyboardInterrupt, ends the
        waiting but not the killing.

        Returns:
            The exit code; None if the process was never started.
        """
        if self._process is None:
            return None
        if not self._is_stopped:
            family = self.family()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it ignores SIGTERM: killed below
                    self._end_in_good_order(self._process, family)
            finally:
                self._kill([*family, *self.family()])
                self._process.wait()
                self._is_stopped = True
        return self._process.returncode

    def _end_in_good_order(self, process: subprocess.Popen[bytes], family: Iterable[psutil.Process]) -> None:
        """
        Send SIGTERM and wait. Raises TimeoutExpired if the process itself has not ended; its family
        may still run.
        """
        if process.poll() is None:
            process.terminate()
            process.wait(self._stop_timeout_s)
        _wait_ended([*family, *self.family()], self._children_timeout_s)

    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start it first"
        return self._process

    def _kill(self, family: Iterable[psutil.Process]) -> None:
        """Send SIGKILL to the group while it has members, and to the processes that have left it."""
        if living := _living(family):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_ended(living, KILLED_TIMEOUT_S)

    # --- output -------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return f"http://{LOOPBACK}:{self.port}"

    def answers(self, path: str) -> bool:
        """Whether the server answers a GET with 200 yet. Raises ServerFailedError if it has ended."""
        self.check_alive()
        try:
            return self._get(path)[0] == HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def page(self, path: str) -> str:
        """The body of a page. Raises ServerFailedError if there is none."""
        try:
            status, body = self._get(path)
        except (OSError, http.client.HTTPException) as error:
            self.check_alive()
            raise self.failure(f"{self.name} does not answer {path}: {error}") from error
        if status != HTTPStatus.OK:
            raise self.failure(f"{self.name} answers {path} with {status}")
        return body

    def wait_ready(self, path: str, timeout_s: float) -> float:
        """
        Wait until the server answers a GET with 200.

        Returns:
            Seconds waited.

        Raises:
            ServerFailedError: It has ended, or is not ready in time.
        """
        return self.wait_until(lambda: self.answers(path), "ready", timeout_s)

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float, *, poll_s: float = POLL_S
    ) -> float:
        """
        Wait for a condition.

        Args:
            condition: Polled until it returns true.
            what: The condition in words, for the error.
            timeout_s: How long to wait.
            poll_s: Time between two polls.

        Returns:
            Seconds waited.

        Raises:
            ServerFailedError: The server has ended, or the condition does not hold in time.
        """
        began_s = time.monotonic()
        while not condition():
            self.check_alive()
            if time.monotonic() - began_s > timeout_s:
                raise self.failure(f"{self.name}: not {what} after {timeout_s:g} s")
            time.sleep(poll_s)
        return time.monotonic() - began_s

    def log_tail(self, n_lines: int = TAIL_LINES) -> str:
        """The end of the output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-n_lines:])

    def failure(self, reason: str) -> ServerFailedError:
        """An error with this reason and the end of the output."""
        return ServerFailedError(reason, log=self.log, log_tail=self.log_tail())

    def _get(self, path: str) -> tuple[int, str]:
        """Status and body. Raises OSError or HTTPException if there is no answer."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=HTTP_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that have not ended; a zombie counts as ended."""
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _wait_ended(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """Wait until all of them have ended, or until the timeout."""
    end_s = time.monotonic() + timeout_s
    while (processes := _living(processes)) and time.monotonic() < end_s:
        time.sleep(ENDING_POLL_S)
