"""
Which agent must be woken next.

Only the earliest request of an agent counts: a premature wake-up does no harm, and a woken agent states anew when it
wants the next. Obsolete entries stay in the heap until they come up.
"""

from heapq import heappop, heappush

from cascadeinfer.core.bidask.rounds import NEVER
from cascadeinfer.core.types import InstanceId


class WakeUps:
    """See the module header."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, InstanceId]] = []
        self._wake_of: dict[InstanceId, float] = {}

    def at(self, instance_id: InstanceId, wake_s: float) -> None:
        """Make sure that this instance's agent is woken by then."""
        if wake_s < self._wake_of.get(instance_id, NEVER):
            self._wake_of[instance_id] = wake_s
            heappush(self._heap, (wake_s, instance_id))

    def next_s(self) -> float | None:
        """When the next agent must be woken; None if none."""
        while self._heap and self._wake_of.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, now_s: float) -> InstanceId | None:
        """The instance whose agent must be woken now, the longest overdue first; its entry is then removed."""
        wake_s = self.next_s()
        if wake_s is None or wake_s > now_s:
            return None
        instance_id = self._heap[0][1]
        del self._wake_of[instance_id]
        return instance_id

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone."""
        self._wake_of.pop(instance_id, None)
