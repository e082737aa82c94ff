"""
An event loop whose clock jumps: nothing sleeps, time-outs cost nothing, and every run has the same order of events.

When no callback is ready, the clock moves to the next timer. Without a timer, nothing can ever happen again, which is
an error that names the waiting tasks. `@virtual_time` runs an async test on such a loop, and fails it if tasks are left
over, if a callback raised, or if more than `limit_s` of virtual time passes.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LIMIT_S = 3600.0


class StuckError(AssertionError):
    """Nothing can happen any more, or the limit of virtual time has passed."""


class _JumpingSelector(selectors.SelectSelector):
    """Never waits; tells the loop how long it would have waited."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout != 0:
            self._jump(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module header."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """Create a loop at time zero."""
        self._virtual_now_s = 0.0
        self._limit_s = limit_s
        self.failures: list[dict[str, Any]] = []
        super().__init__(_JumpingSelector(self._jump))
        self._clock_resolution = 1e-9
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual_now_s

    def stall(self, seconds: float) -> None:
        """Let time pass while nothing runs, as when the process is stopped or a callback blocks the loop."""
        self._virtual_now_s += seconds

    def timers(self) -> list[asyncio.TimerHandle]:
        """Pending timers."""
        return [handle for handle in self._scheduled if not handle.cancelled()]

    def _jump(self, timeout_s: float | None) -> None:
        if timeout_s is None:
            raise StuckError(f"nothing can happen any more; waiting: {self._waiting()}")
        self._virtual_now_s += timeout_s
        if self._virtual_now_s > self._limit_s:
            raise StuckError(f"not over after {self._limit_s:g} virtual seconds; waiting: {self._waiting()}")

    def _waiting(self) -> list[str]:
        return sorted(f"{task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks(self))


def run(main: Coroutine[Any, Any, T], *, limit_s: float = LIMIT_S) -> T:
    """Run to the end on a new loop; asserts that no task is left over and no callback failed."""
    loop = VirtualTimeLoop(limit_s)
    try:
        try:
            result = loop.run_until_complete(main)
            left = loop._waiting()
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.call_soon(loop.stop)
            loop.run_forever()
        assert not left, f"tasks left over: {left}"
        assert not loop.failures, f"callbacks failed: {loop.failures}"
        return result
    finally:
        loop.close()


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def in_virtual_time(*args: Any, **keywords: Any) -> None:
        run(test(*args, **keywords))

    return in_virtual_time
