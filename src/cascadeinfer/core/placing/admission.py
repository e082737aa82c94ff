"""
Admission control: which requests may wait, which one is refused, and when its client may retry.

`DrainRate` tracks how many requests leave the instances per second, over the last `MEMORY` of them and at most
`HORIZON_S`. The time since the last one counts, so a stall shows at once. `Retry-After` is the time in which, at this
rate, the queue and one more request would drain.

When the queue is full, the request that would run last is refused: among those with the highest priority number (in
vLLM a lower number runs earlier), the youngest. That may be the newcomer. A request that has output is never refused,
because its client is already reading.
"""

from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from cascadeinfer.core.view import RequestView

MEMORY: Final = 64
"""Number of recent finishes that the rate is computed from."""
HORIZON_S: Final = 60.0
"""Older finishes say nothing about the present."""
MIN_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
"""Bounds of `Retry-After`: it is in whole seconds, and beyond a minute the estimate is worthless."""

RUN_ORDER: Final = attrgetter("priority", "arrival")


class DrainRate:
    """The recent rate at which requests finish, in requests per second."""

    def __init__(self) -> None:
        """Start without any finished request."""
        self._ends_s: deque[float] = deque(maxlen=MEMORY)

    def note_end(self, now_s: float) -> None:
        """Record that a running request has finished."""
        self._ends_s.append(now_s)

    def per_second(self, now_s: float) -> float:
        """The rate; 0.0 while fewer than two finishes are known, or when all of them happened just now."""
        while self._ends_s and self._ends_s[0] < now_s - HORIZON_S:
            self._ends_s.popleft()
        if len(self._ends_s) < 2 or now_s <= self._ends_s[0]:
            return 0.0
        return (len(self._ends_s) - 1) / (now_s - self._ends_s[0])

    def retry_after_s(self, n_queued: int, now_s: float, unknown_s: float) -> float:
        """Seconds after which a refused client may retry; `unknown_s` when no rate is known."""
        rate = self.per_second(now_s)
        if rate == 0.0:
            return unknown_s
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (n_queued + 1) / rate))


def to_refuse(queued: Iterable[RequestView]) -> RequestView | None:
    """The request to refuse when the queue is full; None when every request has output."""
    return max((r for r in queued if r.settled_tokens == r.prompt_tokens), key=RUN_ORDER, default=None)
