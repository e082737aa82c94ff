"""
How long somebody has been silent, counted by one who may have slept.

A process that was stopped (SIGSTOP, a debugger, a swapped-out machine), or whose event loop was blocked, finds all its time limits over
when it goes on, and in its buffers the words of everybody who has spoken meanwhile. So whoever measures silence looks at its own
watch at short intervals. A look that comes much later than it should tells of the watcher's own sleep: it says nothing of the other.
"""

from typing import Final

OVERSLEPT_SHARE: Final = 0.2
"""Share of a time limit, see `oversleeps`."""
OVERSLEPT_LEAST_S: Final = 1.0
"""Later than this at any rate: an event loop that has much to do is awake."""
TOLERANCE_S: Final = 1e-6
"""Of sums of intervals."""


def oversleeps(limit_s: float) -> float:
    """By how much a look may come late that is made within this time limit; any later, and the watcher has slept."""
    return max(OVERSLEPT_SHARE * limit_s, OVERSLEPT_LEAST_S)


class Silence:
    """
    Says when a time limit is over.

    After an own sleep the count starts again: the other gets the whole limit once more to answer.
    """

    def __init__(self, limit_s: float) -> None:
        """
        Args:
            limit_s: How long a silence may last.
        """
        self.limit_s = limit_s
        self.counted_s = 0.0

    def heard(self) -> None:
        """There was an answer."""
        self.counted_s = 0.0

    def looked(self, meant_s: float, took_s: float) -> float:
        """
        Nothing was heard between two looks.

        Args:
            meant_s: How long after the last look this one was meant to come.
            took_s: How long after it came.

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
