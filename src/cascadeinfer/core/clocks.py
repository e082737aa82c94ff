"""
A bound for the clock of another process, from its answers.

Two processes need not share a clock, and a pull must not get more time than it has. A moment is therefore converted so
that the result can only be too early: an answer that is received at `r` and reads `T` on the other clock was sent at
`r` or before, so at `r` the other clock showed `T` or more. Delays make the bound looser, never wrong; of several
answers the fastest counts. Old answers are dropped, because clocks drift.
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
