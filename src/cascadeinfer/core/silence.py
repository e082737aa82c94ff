"""
How long a peer has been silent, measured by a watcher that may itself have slept.

A process that was stopped (SIGSTOP, a debugger, a swapped-out machine), or whose event loop was blocked, finds all its
time limits expired when it resumes, and its buffers full of what everybody has sent meanwhile. A watcher therefore
checks at short intervals. A check that comes much later than planned reveals the watcher's own sleep and says nothing
of the peer.
"""

from typing import Final

OVERSLEPT_SHARE: Final = 0.2
"""Share of a time limit, see `oversleeps`."""
OVERSLEPT_LEAST_S: Final = 1.0
"""Least lateness that counts as sleep: a busy event loop is awake."""
TOLERANCE_S: Final = 1e-6
"""Rounding error of sums of intervals."""


def oversleeps(limit_s: float) -> float:
    """How late a check within this time limit may come; if it comes later, the watcher has slept."""
    return max(OVERSLEPT_SHARE * limit_s, OVERSLEPT_LEAST_S)


class Silence:
    """
    Tells when a time limit is over.

    After the watcher's own sleep the count restarts: the peer gets the whole limit to answer again.
    """

    def __init__(self, limit_s: float) -> None:
        """
        Args:
            limit_s: How long a silence may last.
        """
        self.limit_s = limit_s
        self.counted_s = 0.0

    def heard(self) -> None:
        """Record that the peer was heard."""
        self.counted_s = 0.0

    def looked(self, meant_s: float, took_s: float) -> float:
        """
        Record that nothing was heard between two checks.

        Args:
            meant_s: Planned time between the last check and this one.
            took_s: Actual time between them.

        Returns:
            How long the watcher has slept; 0.0 when it was awake.
        """
        slept_s = took_s - meant_s
        if slept_s > oversleeps(self.limit_s):
            self.counted_s = 0.0
            return slept_s
        self.counted_s += took_s
        return 0.0

    @property
    def is_over(self) -> bool:
        """Whether the silence has lasted for the limit."""
        return self.counted_s >= self.limit_s - TOLERANCE_S
