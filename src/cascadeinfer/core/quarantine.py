"""
Which request ends the instances that run it.

An instance that dies says nothing of why. Its requests go on elsewhere, and one that kills whatever runs it would end one instance after
the other. So every request that was in an engine when it died has a *death*, and is *suspected*: of suspected requests at most one at a
time is in an engine, the others that are to run there are held back. Requests without a death run beside it. If that engine dies
too, two deaths point at one request, and it is ended; those beside it have their first.

A suspected request has proven itself with its first token since its death: it has passed the step in which it died, so after an ordinary death
the others wait a step or two each. Its death counts on. If its instance dies again it is ended, unless others beside it have died before as well:
which of them it was is then open, and they are suspected once more, until they end.

Nothing is known here of time, streams or engines; whoever uses it says what happens and sends what it is told to.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.types import InstanceId, RequestId

DEATHS: Final = 2


@dataclass(slots=True)
class Suspicion:
    """
    Of one request.

    Attributes:
        deaths: Instances that died with it.
        is_open: Whether it has not proven itself since.
        until_end: Whether no token proves it any more.
    """

    deaths: int = 0
    is_open: bool = True
    until_end: bool = False


@dataclass(slots=True)
class _Cell:
    """The suspected request that is in an engine, and those that are held back from it."""

    inside: RequestId | None = None
    held: deque[RequestId] = field(default_factory=deque)


class Quarantine:
    """See the module header."""

    def __init__(self, deaths: int = DEATHS) -> None:
        """
        Nobody has died.

        Args:
            deaths: So many name a culprit.
        """
        self._deaths = deaths
        self.suspicions: dict[RequestId, Suspicion] = {}
        self._cells: dict[InstanceId, _Cell] = {}
        self._cell_of: dict[RequestId, InstanceId] = {}

    def is_suspected(self, request_id: RequestId) -> bool:
        """Whether a request has died and not proven itself since."""
        suspicion = self.suspicions.get(request_id)
        return suspicion is not None and suspicion.is_open

    def is_held(self, request_id: RequestId) -> bool:
        """Whether a request is held back from its instance."""
        instance_id = self._cell_of.get(request_id)
        return instance_id is not None and self._cells[instance_id].inside != request_id

    def may_enter(self, request_id: RequestId, instance_id: InstanceId) -> bool:
        """
        A request is to run on an instance.

        Returns:
            Whether it may be sent there now; else it is held back, and `leave` or `prove` of another will name it.
        """
        if not self.is_suspected(request_id):
            return True
        assert request_id not in self._cell_of, f"request {request_id} is somewhere already"
        cell = self._cells.setdefault(instance_id, _Cell())
        self._cell_of[request_id] = instance_id
        if cell.inside is None:
            cell.inside = request_id
            return True
        cell.held.append(request_id)
        return False

    def leave(self, request_id: RequestId) -> RequestId | None:
        """A request is on its instance no more. Returns the one that may be sent there now, if any was held back."""
        instance_id = self._cell_of.pop(request_id, None)
        if instance_id is None:
            return None
        cell = self._cells[instance_id]
        if cell.inside != request_id:
            cell.held.remove(request_id)
            return None
        cell.inside = cell.held.popleft() if cell.held else None
        if cell.inside is None:
            del self._cells[instance_id]
        return cell.inside

    def prove(self, request_id: RequestId) -> RequestId | None:
        """A request has a token more than when it died. Returns the one that may be sent to its instance now, if any."""
        suspicion = self.suspicions.get(request_id)
        if suspicion is None or not suspicion.is_open or suspicion.until_end:
            return None
        suspicion.is_open = False
        return self.leave(request_id)

    def forget(self, request_id: RequestId) -> None:
        """A request has ended; `leave` was called."""
        self.suspicions.pop(request_id, None)

    def die(self, instance_id: InstanceId, there: Iterable[RequestId]) -> RequestId | None:
        """
        An instance died.

        Args:
            there: The requests whose place it was; those that were held back were not in its engine.

        Returns:
            The request that did it, if that is known now.
        """
        cell = self._cells.pop(instance_id, _Cell())
        for request_id in [r for r, place in self._cell_of.items() if place == instance_id]:
            del self._cell_of[request_id]
        inside = [request_id for request_id in there if request_id not in cell.held]
        for request_id in inside:
            self.suspicions.setdefault(request_id, Suspicion()).deaths += 1
        guilty = [request_id for request_id in inside if self.suspicions[request_id].deaths >= self._deaths]
        culprit = cell.inside if cell.inside in guilty else guilty[0] if len(guilty) == 1 else None
        for request_id in inside:
            suspicion = self.suspicions[request_id]
            suspicion.is_open = True
            suspicion.until_end = suspicion.deaths >= self._deaths
        return culprit
