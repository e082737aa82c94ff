"""
The environment in which an instance's processes are started.

An instance's settings reach vLLM through environment variables that its processes inherit. `ProcessStart` sets them
only for the moment of the start, under a lock, so that several instances can start in parallel without seeing each
other's variables. To read what the operator has set, use `operator_environment`: `os.environ` may hold an instance's
variables at that moment.
"""

import os
import threading
from collections.abc import Mapping
from typing import ClassVar


class ProcessStart:
    """
    The environment that one instance's processes inherit.

    `enter` and `leave` bracket the moment of the start, possibly in different threads' stacks; `leave` may be called
    twice. An empty set of variables protects the start of another process (a front end) from inheriting an instance's
    variables.
    """

    _lock = threading.Lock()
    _changing = threading.Lock()
    #: Previous values of the variables set for the start under way; None for those that were unset.
    _before: ClassVar[dict[str, str | None]] = {}

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Remember the variables to set."""
        self._environment = dict(environment)
        self._entered = False

    def enter(self) -> None:
        """Wait for the lock and set the variables."""
        self._lock.acquire()
        with self._changing:
            self._before.update({name: os.environ.get(name) for name in self._environment})
            os.environ.update(self._environment)
        self._entered = True

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Restore the variables and let the next one start."""
        if not self._entered:
            return
        with self._changing:
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._before.clear()
        self._entered = False
        self._lock.release()

    @classmethod
    def environment_before(cls) -> dict[str, str]:
        """Variables of this process without those of the start under way."""
        with cls._changing:
            now: dict[str, str | None] = {**os.environ, **cls._before}
        return {name: value for name, value in now.items() if value is not None}


def operator_environment() -> dict[str, str]:
    """The variables this process was started with or has set itself, without those of an instance that is starting."""
    return ProcessStart.environment_before()
