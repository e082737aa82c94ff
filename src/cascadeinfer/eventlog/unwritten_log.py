"""
The stand-in for an event log that could not be opened, in a process that serves without one.

It counts events, so that metrics and `/admin` show what is missing.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.eventlog.writer import EventLog


class UnwrittenLog:
    """
    Stands in for the event log of a process whose log file could not be opened.

    Attributes:
        events: Number of events so far.
        dropped: The same number: all of them are missing.
        failure: Why there is no log.
    """

    def __init__(self, failure: str) -> None:
        """
        Args:
            failure: Why there is no log.
        """
        self.events = 0
        self.failure = failure

    @property
    def dropped(self) -> int:
        """See the attribute."""
        return self.events

    def __call__(self, now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:  # noqa: ARG002 - called as an EventLog is
        """Count an event."""
        self.events += 1

    def close(self) -> None:
        """Do nothing: no file is open."""


ServerLog: TypeAlias = EventLog | UnwrittenLog
"""The event log of a server."""


def failure_of(log: ServerLog | None) -> Callable[[], str | None]:
    """A function that returns why nothing more is written; None when all is well or there is no log to write."""
    return lambda: None if log is None else log.failure
