"""
The story of each live request, for the operator's page: its arrival, dispatches, moves and losses, in words.

An observer of the policy driver. It keeps the events and effects themselves, a few per request; words are made when
somebody asks, by the narrator of event logs. Of the messages behind a move, the award says which bids there were; the
others are in the event log only.
"""

from collections.abc import Sequence
from typing import Any, Final

from cascadeinfer.core.effects import Dispatch, Effect, Reject, StartMigration
from cascadeinfer.core.events import Event, FirstToken, InstanceLost, MigrationEnded, RequestArrived
from cascadeinfer.eventlog.story import Telling
from cascadeinfer.runtime.driver import Observer
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.streams import Step, Stream, StreamTable

MAX_STEPS: Final = 48
"""Per request; the arrival and the latest ones are kept."""


class Stories:
    """See the module header, and `Observer`."""

    def __init__(self, streams: StreamTable, fleet: Fleet, observer: Observer | None) -> None:
        """
        Args:
            streams: The live requests, which carry their steps.
            fleet: Has the stages in force.
            observer: Sees everything, too.
        """
        self._streams = streams
        self._fleet = fleet
        self._observer = observer

    def __call__(self, now_s: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
        """Note what concerns a live request."""
        match event:
            case RequestArrived() | FirstToken() | MigrationEnded():
                self._note(event.request_id, now_s, event)
            case InstanceLost():
                for request_id in event.orphan_ids:
                    self._note(request_id, now_s, event)
            case _:
                pass
        for effect in effects:
            if isinstance(effect, Dispatch | StartMigration | Reject):
                self._note(effect.request_id, now_s, effect)
        if self._observer is not None:
            self._observer(now_s, event, effects, failed)

    def _note(self, request_id: str, now_s: float, what: Event | Effect) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if len(stream.steps) >= MAX_STEPS:
            del stream.steps[1]
            stream.n_dropped_steps += 1
        stream.steps.append(Step(now_s, what, stream.n_tokens, self._fleet.layout))


def story_of(stream: Stream, now_s: float) -> dict[str, Any]:
    """
    A live request's story as JSON: `id`, `instance`, `tokens`, `dropped` (steps left out after the first), and
    `chapters` with `seconds_ago` and `text`.
    """
    telling = Telling(stream.request.request_id)
    chapters = []
    for step in stream.steps:
        telling.layout, telling.tokens = step.layout, step.n_tokens
        chapters += [{"seconds_ago": round(now_s - step.at_s, 3), "text": text} for text in telling.of(step.what)]
    return {
        "id": stream.request.request_id,
        "instance": stream.instance_id,
        "tokens": stream.n_tokens,
        "dropped": stream.n_dropped_steps,
        "chapters": chapters,
    }
