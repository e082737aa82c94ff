"""
The virtual clock: a heap of actions ordered by (time, priority, order, sequence).

`priority` orders actions of different kinds at the same moment: an instance's results come before requests to it, and
reports come last, so that they show the moment's result. `order` orders actions of one kind (by an instance's number),
and the sequence of scheduling decides the rest. Nothing depends on hashing or on how actions compare.
"""

import enum
import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Priority(enum.IntEnum):
    """Order of actions at the same moment."""

    STEP = 0
    """An instance's step ends."""
    TRANSFER = 1
    """KV cache has arrived."""
    CONTROL = 2
    """A command or answer of a migration, or its time limit."""
    FAULT = 3
    MESSAGE = 4
    """A bid-ask message arrives."""
    ARRIVAL = 5
    REPORT = 6
    TIMER = 7
    """The policy's timer."""


_STEP = int(Priority.STEP)


class Kernel:
    """
    Runs actions in order of time. See the module header.

    Attributes:
        now_s: The clock.
        events: Actions run.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._sequence = 0
        self._stepping: int | None = None
        self._heap: list[tuple[float, int, int, int, Callable[[Any], None], Any]] = []

    def at(
        self, time_s: float, priority: Priority, action: Callable[[Any], None], argument: Any, *, order: int = 0
    ) -> None:
        """Call `action(argument)` at `time_s`, which must not be in the past."""
        assert time_s >= self.now_s, f"{action} at {time_s} s is before now, {self.now_s} s"
        heappush(self._heap, (time_s, priority, order, self._sequence, action, argument))
        self._sequence += 1

    def next_s(self) -> float | None:
        """When the next action is due; None when there is none."""
        return self._heap[0][0] if self._heap else None

    def settled_s(self, order: int) -> float:
        """
        Time up to which the steps of the instance with this number have happened: now, or just before now while the
        steps that end now are still being processed and its turn has not come.
        """
        stepping = self._stepping
        return self.now_s if stepping is None or stepping >= order else math.nextafter(self.now_s, -math.inf)

    def step(self, until_s: float = math.inf) -> bool:
        """
        Move the clock to the next action and run it.

        Returns:
            False when there is none, or none until `until_s` (inclusive); the clock stays.
        """
        heap = self._heap
        if not heap or heap[0][0] > until_s:
            return False
        self.now_s, priority, order, _, action, argument = heappop(heap)
        self._stepping = order if priority == _STEP else None
        self.events += 1
        action(argument)
        return True
