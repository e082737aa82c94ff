"""
Whether an instance answers in time: the watch over one question at a time.

The limit follows the instance: `suspect_s` beyond the longest of its last answers (an answer comes between two steps,
so it may take as long as the longest step), which fades with each further answer. An instance that has just been
suspected wrongly therefore gets more time, and an instance that was suspected is trusted again after the first answer
that came in time, not after the late one: both keep it from going to and fro.

Silence is counted in slices, and a slice that this process itself has overslept starts the count anew: who was asleep
heard nothing, and the answer may have been there.
"""

import asyncio
from collections.abc import Callable
from typing import Final

SLICES: Final = 4
"""Of the limit; an overslept slice is one that ends more than a whole one too late."""
FADING: Final = 0.9
"""Of the longest answer, per answer: at the usual interval half of it is gone after 0.7 s."""
LONGEST_COUNTED: Final = 4.0
"""Times `suspect_s`: an answer that took longer was a fault, and says nothing about the next."""


class AnswerWatch:
    """See the module header."""

    def __init__(self, suspect_s: float, suspected: Callable[[], None], trusted: Callable[[], None]) -> None:
        """
        Args:
            suspect_s: Beyond what is usual, in seconds; infinite: nobody is suspected.
            suspected: Called when an answer is overdue, and again whenever as much time has passed without it.
            trusted: Called when the first one in time has come after that.
        """
        self._suspect_s = suspect_s
        self._suspected = suspected
        self._trusted = trusted
        self._longest_s = 0.0
        self._asked_s = 0.0
        self._slices = 0
        self._overdue = False
        self._is_suspect = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit_s(self) -> float:
        """How long the next answer may take."""
        return self._suspect_s + self._longest_s

    def asked(self) -> None:
        """A question is on its way."""
        self._asked_s = asyncio.get_running_loop().time()
        self._slices = 0
        self._overdue = False
        if self._suspect_s < float("inf"):
            self._wait()

    def answered(self) -> None:
        """Its answer is here."""
        self.stop()
        took_s = asyncio.get_running_loop().time() - self._asked_s
        self._longest_s = max(min(took_s, LONGEST_COUNTED * self._suspect_s), FADING * self._longest_s)
        if self._is_suspect and not self._overdue:
            self._is_suspect = False
            self._trusted()

    def stop(self) -> None:
        """No more questions, or none under way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        slice_s = self.limit_s / SLICES
        self._timer = loop.call_later(slice_s, self._look, loop.time() + slice_s, slice_s)

    def _look(self, due_s: float, slice_s: float) -> None:
        self._timer = None
        late_s = asyncio.get_running_loop().time() - due_s
        self._slices = 0 if late_s > slice_s else self._slices + 1
        if self._slices < SLICES:
            self._wait()
            return
        self._overdue = self._is_suspect = True
        self._slices = 0
        self._wait()
        self._suspected()
