"""
Does a policy repeat what the log says it did? A fresh one is given the log's events at the log's times.

A policy is a deterministic function of its options and its events (`core/policy.py`). A difference therefore means that
the log was written by another version of the policy or on another machine (the last bit of a float), or that the policy
is not deterministic, which is a bug.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cascadeinfer.core.effects import Effect
from cascadeinfer.core.errors import CascadeError, EventLogError
from cascadeinfer.core.policy import Policy
from cascadeinfer.eventlog.reader import Gap, LoggedEvent, LogReader

CONTEXT_EVENTS: Final = 5
"""Events shown before a difference."""


@dataclass(frozen=True, slots=True)
class Difference:
    """
    The first place where the replay departs from the log.

    Attributes:
        logged: The event and its logged effects.
        effects: The effects of the replayed policy.
        failed: The exception that it raised, if any.
        before: The preceding events, oldest first.
    """

    logged: LoggedEvent
    effects: tuple[Effect, ...]
    failed: str | None
    before: tuple[LoggedEvent, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """What was compared; `difference` is None when everything matched."""

    events: int
    effects: int
    difference: Difference | None


def replay(log: LogReader) -> Replay:
    """
    Replay a log up to its end or the first difference.

    Raises:
        EventLogError: The log cannot be replayed: its beginning was rotated away, or events are missing from some point
            on.
    """
    if log.header.part != 1:
        raise EventLogError(
            f"{log.paths[0]}: the log begins with part {log.header.part}, the parts before it were rotated away: "
            "it cannot be "
            "replayed (a larger --event-log-mb or --event-log-files keeps more)"
        )
    spec = log.spec()
    try:
        policy = spec.make()
    except (TypeError, ValueError, CascadeError) as error:
        raise EventLogError(f"{log.paths[0]}, line 1: policy {spec.name} cannot be made: {error}") from error
    before: deque[LoggedEvent] = deque(maxlen=CONTEXT_EVENTS)
    n_events = n_effects = 0
    for entry in log:
        if isinstance(entry, Gap):
            raise EventLogError(
                f"{entry.place}: {entry.count} events are missing: the {n_events} events before replay the same, "
                "those that follow cannot be compared"
            )
        effects, failed = _handle(policy, entry)
        if effects != entry.effects or failed != entry.failed:
            return Replay(n_events, n_effects, Difference(entry, effects, failed, tuple(before)))
        before.append(entry)
        n_events += 1
        n_effects += len(effects)
    return Replay(n_events, n_effects, None)


def _handle(policy: Policy, entry: LoggedEvent) -> tuple[tuple[Effect, ...], str | None]:
    try:
        effects: Sequence[Effect] = policy.handle(entry.event, entry.at_s)
    except Exception as error:  # noqa: BLE001 - what the policy does is what is compared
        return (), type(error).__name__
    policy.next_timer_s()  # as every shell does after each event
    return tuple(effects), None
