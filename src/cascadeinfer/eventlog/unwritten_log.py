"""What stands for the event log of a process that serves on without one: it counts, so that metrics and `/admin` tell what is missing."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event
from cascadeinfer.eventlog.writer import EventLog


class UnwrittenLog:
    """
    Stands for the event log of a process that serves on without one, since its file could not be opened.

    Attributes:
        events: So far.
        dropped: All of them.
        failure: Why.
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
        """Nothing is open."""


ServerLog: TypeAlias = EventLog | UnwrittenLog
"""What a server keeps of its events."""


def failure_of(log: ServerLog | None) -> Callable[[], str | None]:
    """What asks why nothing more is written; None: all is well, or there is no log to write."""
    return lambda: None if log is None else log.failure
