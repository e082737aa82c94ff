"""
The clock of another process, as far as its answers tell.

Two processes need not have a clock in common, and a pull must not be given more time than it has. So a moment is converted in such a way
that it can only come out too early: an answer that is heard at `r` and says that the other clock showed `T` was given at `r` or before,
so at `r` the other clock showed `T` or more. Whatever delays the answer makes the bound looser and never wrong; of several answers the
quickest counts. Old ones are dropped, because clocks drift.
"""

from collections import deque
from typing import Final

ANSWERS_KEPT: Final = 16


class ClockBound:
    """A lower bound for what another clock shows, from its answers."""

    def __init__(self) -> None:
        """No answer yet."""
        self._leads_s: deque[float] = deque(maxlen=ANSWERS_KEPT)

    def answered(self, their_s: float, heard_s: float) -> None:
        """An answer that says `their_s` on the other clock was heard at `heard_s` on ours."""
        self._leads_s.append(their_s - heard_s)

    def at_other(self, moment_s: float) -> float:
        """What the other clock shows at this moment of ours, or less; minus infinity before the first answer."""
        return moment_s + max(self._leads_s, default=float("-inf"))
