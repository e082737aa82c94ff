"""
How long an instance that keeps dying waits before it is started again.

The wait doubles with every death within a sliding window, failed starts included. One long life does not reset it:
otherwise an instance that dies every six minutes would be restarted at once each time, for ever.
"""

from collections import deque
from typing import Final, NamedTuple

REMEMBERED: Final = 64
"""Deaths; any more within the window change nothing."""


class Death(NamedTuple):
    """When an instance died or failed to start, and why."""

    at_s: float
    why: str


class BackOff:
    """
    One instance's.

    Attributes:
        deaths: The last ones, the oldest first; those that have left the window are forgotten at the next one.
    """

    def __init__(self, first_s: float, max_s: float, window_s: float) -> None:
        """
        Args:
            first_s: The wait after the first death.
            max_s: The longest wait.
            window_s: Deaths count for this long.
        """
        self._first_s = first_s
        self._max_s = max_s
        self._window_s = window_s
        self.deaths: deque[Death] = deque(maxlen=REMEMBERED)

    def died(self, now_s: float, why: str) -> float:
        """It died, or did not start. Returns how long to wait before the next start."""
        while self.deaths and now_s - self.deaths[0].at_s >= self._window_s:
            self.deaths.popleft()
        self.deaths.append(Death(now_s, why))
        return min(self._first_s * 2.0 ** (len(self.deaths) - 1), self._max_s)

    def in_window(self, now_s: float) -> list[Death]:
        """Deaths that count now, the oldest first."""
        return [death for death in self.deaths if now_s - death.at_s < self._window_s]
