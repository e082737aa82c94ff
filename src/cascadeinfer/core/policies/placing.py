"""
What simple policies share: view, dispatch, failures and draining.

The base class keeps the view up to date, dispatches waiting requests, places orphans and the requests of a suspect
instance anew, and empties an instance that drains. A subclass only chooses the instance for a request (`choose`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from cascadeinfer.core.effects import Dispatch, Effect
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    InstanceSuspected,
    InstanceTrusted,
    RequestArrived,
)
from cascadeinfer.core.placing.dispatch import Chosen
from cascadeinfer.core.placing.evacuation import Evacuation
from cascadeinfer.core.view import ClusterView, InstanceView, RequestView


class PlacingPolicy(ABC):
    """Dispatches each request once and moves it only when its instance drains."""

    evacuates: ClassVar[bool] = True
    """Whether this class moves requests off a draining instance; a policy with its own migrations does so itself."""

    def __init__(self) -> None:
        """Start with an empty view."""
        self.view = ClusterView()
        self._evacuation = Evacuation(self.view)

    @abstractmethod
    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The instance that takes the request. `candidates` can all hold it at its longest; not empty, by id."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        self.view.apply(event)
        if isinstance(event, RequestArrived | InstanceJoined | InstanceLost | InstanceSuspected | InstanceTrusted):
            return self.place_waiting(event.cause)
        if not self.evacuates:
            return []
        self._evacuation.note(event, now_s)
        if isinstance(event, InstanceReported | InstanceDraining):
            source = self.view.instances.get(event.instance_id)
            if source is not None and source.draining:
                return list(self._evacuation.moves(source, event.cause, now_s))
        return []

    def next_timer_s(self) -> float | None:
        """No timers."""
        return None

    def place_waiting(self, cause: str) -> list[Effect]:
        """Dispatch all that wait, in order of arrival. A request that no instance in use could hold keeps waiting."""
        effects: list[Effect] = []
        for request in self.view.unplaced():
            available = self.view.available()
            if not available:
                break
            candidates = self.view.able(request, available)
            if not candidates:
                continue
            chosen = self.choose(request, candidates)
            placed = Dispatch(cause, request.request_id, chosen.instance.instance_id, choice=chosen.choice)
            self.view.carry_out([placed])
            effects.append(placed)
        return effects
