"""
SIGINT and SIGTERM, from the first import to the last request.

    before the event loop attends     nothing of ours runs: the handler itself ends the process
    while the server starts           the start is cancelled; the process ends when all it had started has stopped
    while it serves                   the first signal drains, the second stops at once

A start interrupted by a signal ends with one line and 128 + the signal's number, whatever it was doing; a second signal
kills what was started instead of waiting for it to stop. The process ends by `os._exit`: an exception could be
swallowed in the middle of an import, and threads blocked inside vLLM would be waited for. So nothing may rely on
Python's own clean-up: what has to be removed is in `at_leave`.

The handlers are plain ones (`signal.signal`), not the event loop's: those run only when the loop gets its turn, which
it does not while a model is downloaded or a configuration is made.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import psutil

if TYPE_CHECKING:  # seconds of imports, and the signal handlers must come first
    import uvicorn

logger = logging.getLogger(__name__)

NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)
STDERR: Final = 2
KILL_TIMEOUT_S: Final = 5.0


class StopSignals:
    """
    See the module header.

    Attributes:
        told: Called with `at_once` when the server must stop.
        at_leave: Called in reverse order before a process stopped during its start exits.
    """

    def __init__(self, *, second_is_at_once: bool = True, says_so: bool = True) -> None:
        """
        Install nothing yet.

        Args:
            second_is_at_once: Whether a second signal stops at once; a follower may get one from the terminal and one
                from process 0.
            says_so: Whether a stopped start prints a line.
        """
        self.told: list[Callable[[bool], None]] = []
        self.at_leave: list[Callable[[], None]] = []
        self._second_is_at_once = second_is_at_once
        self._says_so = says_so
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._server: uvicorn.Server | None = None
        self._starting: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: The signal that stopped the start.
        self._stopped_by: int | None = None
        self._is_held = False
        self._waiting: int | None = None

    def __enter__(self) -> Self:
        """Take the signals over; must run in the main thread."""
        self._before = {number: signal.signal(number, self._on_signal) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defer signals in this context: what is made here is not in `at_leave` yet."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            if (number := self._waiting) is not None:
                self._on_signal(number, None)

    def attend(self) -> None:
        """From now on a signal cancels the current task, which may have started something."""
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.current_task()

    async def until_stopped(self, serving: Awaitable[None]) -> None:
        """Wait for the server to end; leave if it was stopped during its start."""
        try:
            await serving
        finally:
            if self._stopped_by is not None:
                self._leave(self._stopped_by)

    def drain(self, server: "uvicorn.Server") -> None:
        """
        From now on a signal drains this server.

        Raises:
            CancelledError: A signal came before.
        """
        if self._stopped_by is not None:
            raise asyncio.CancelledError
        self._server = server

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # forked, without a handler of its own yet
            os._exit(128 + number)
        if self._is_held:
            self._waiting = number
            return
        if self._loop is None or self._stopped_by is not None:
            self._leave(number)
        if self._server is None:
            self._stopped_by = number
        if not self._loop.is_closed():  # otherwise the server has just ended
            self._loop.call_soon_threadsafe(self._stop_by_signal)

    def _stop_by_signal(self) -> None:
        self.stop(at_once=self._server is not None and self._server.should_exit and self._second_is_at_once)

    def stop(self, at_once: bool) -> None:
        """Drain, or end at once."""
        for tell in self.told:
            tell(at_once)
        if self._server is None:
            self._stopped_by = self._stopped_by or signal.SIGTERM
            assert self._starting is not None
            self._starting.cancel()
        elif at_once:
            logger.warning("stopping at once")
            self._server.should_exit = self._server.force_exit = True
        else:
            logger.warning("draining: no new requests, running ones finish")
            self._server.should_exit = True

    def _leave(self, number: int) -> NoReturn:
        """End this process and everything it has started."""
        kill_all_below()
        for clean in reversed(self.at_leave):
            with contextlib.suppress(OSError):  # what cannot be removed must not keep us here
                clean()
        if self._says_so:
            line = f"cascadeinfer: stopped by {signal.Signals(number).name} while starting\n"
            os.write(STDERR, line.encode())  # not `sys.stderr`, which may be in the middle of a line
        os._exit(128 + number)


def kill_all_below() -> None:
    """
    Kill every process below this one and wait for its end.

    Python's resource tracker is spared: it ends with us, and removes the shared memory that others have left behind.
    """
    # Python exposes the number nowhere else.
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]  # noqa: SLF001 - see above
    while below := [p for p in psutil.Process().children(recursive=True) if p.pid != tracker]:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if psutil.wait_procs(below, timeout=KILL_TIMEOUT_S)[1]:
            return  # not even SIGKILL ends it: it hangs in the kernel, and we must not
