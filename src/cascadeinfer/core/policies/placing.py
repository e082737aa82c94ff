"""
The part that every policy without migration shares: keep the books, place what waits, place orphans anew.

A subclass says only which instance takes a request (`choose`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from cascadeinfer.core.effects import Dispatch, Effect
from cascadeinfer.core.events import Event, InstanceJoined, InstanceLost, RequestArrived
from cascadeinfer.core.view import ClusterView, InstanceView, RequestView


class PlacingPolicy(ABC):
    """Dispatches each request once and never moves it."""

    def __init__(self) -> None:
        """Start with empty books."""
        self.view = ClusterView()

    @abstractmethod
    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> InstanceView:
        """The instance that takes the request; `candidates` is not empty and sorted by id."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:  # noqa: ARG002 - these policies do not look at time
        """See `Policy.handle`."""
        self.view.apply(event)
        if isinstance(event, RequestArrived | InstanceJoined | InstanceLost):
            return self.place_waiting(event.cause)
        return []

    def next_timer_s(self) -> float | None:
        """No timers."""
        return None

    def place_waiting(self, cause: str) -> list[Effect]:
        """Dispatch everything that waits for a place, in order of arrival; nothing while no instance is up."""
        effects: list[Effect] = []
        for request in self.view.unplaced():
            candidates = self.view.available()
            if not candidates:
                break
            chosen = self.choose(request, candidates)
            placed = Dispatch(cause, request.request_id, chosen.instance_id)
            self.view.carry_out([placed])
            effects.append(placed)
        return effects
