"""
Who may wait, who must go, and when those may come again.

`DrainRate` follows how many requests leave the instances per second, over the last `MEMORY` of them and at most `HORIZON_S`; the time since
the last one counts, so that a stall shows at once. `Retry-After` is the time that this many per second take for the queue and one more.

When the queue is full the request that goes is the one that would run last: of the highest priority number (vLLM's meaning: lower runs
earlier), the youngest among them. It may be the newcomer. Requests that have output are never refused: their clients are reading.
"""

from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from cascadeinfer.core.view import RequestView

MEMORY: Final = 64
"""Ends that the rate is taken over."""
HORIZON_S: Final = 60.0
"""Ends longer ago than this say nothing of now."""
MIN_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
"""Bounds of `Retry-After`: it counts whole seconds, and beyond a minute a guess is worth nothing."""

RUN_ORDER: Final = attrgetter("priority", "arrival")


class DrainRate:
    """Requests that end per second, lately."""

    def __init__(self) -> None:
        """Nothing has ended."""
        self._ends_s: deque[float] = deque(maxlen=MEMORY)

    def note_end(self, now_s: float) -> None:
        """A request that ran has ended."""
        self._ends_s.append(now_s)

    def per_second(self, now_s: float) -> float:
        """The rate; 0.0 while fewer than two ends are known, or when they came at once and just now."""
        while self._ends_s and self._ends_s[0] < now_s - HORIZON_S:
            self._ends_s.popleft()
        if len(self._ends_s) < 2 or now_s <= self._ends_s[0]:
            return 0.0
        return (len(self._ends_s) - 1) / (now_s - self._ends_s[0])

    def retry_after_s(self, n_queued: int, now_s: float, unknown_s: float) -> float:
        """When a refused client may come again; `unknown_s` when no rate is known."""
        rate = self.per_second(now_s)
        if rate == 0.0:
            return unknown_s
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (n_queued + 1) / rate))


def to_refuse(queued: Iterable[RequestView]) -> RequestView | None:
    """The request that makes room in a full queue; None when all of them have output."""
    return max((r for r in queued if r.settled_tokens == r.prompt_tokens), key=RUN_ORDER, default=None)
