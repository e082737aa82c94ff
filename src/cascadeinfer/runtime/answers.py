"""
Watches whether an instance answers in time, one question at a time.

The limit adapts to the instance: `suspect_s` beyond the longest recent answer time, which fades with each further
answer. (Answers are given between two steps, so one may take as long as the longest step.) A wrongly suspected instance
therefore gets more time, and a suspected one is trusted again only after the first answer that came in time, not after
the late one. Both rules prevent flapping.

Silence is counted in slices. If this process overslept a slice, the count starts anew: it could not have heard an
answer.
"""

import asyncio
from collections.abc import Callable
from typing import Final

SLICES: Final = 4
"""Of the limit; an overslept slice is one that ends more than a whole one too late."""
FADING: Final = 0.9
"""
Of the longest answer, per answer or, where answers are rarer than usual, per usual interval: half of it is gone after
seven of them.
"""
LONGEST_COUNTED: Final = 4.0
"""Times `suspect_s`: an answer that took longer was a fault, and says nothing about the next."""


class AnswerWatch:
    """See the module header."""

    def __init__(
        self, suspect_s: float, usual_s: float, suspected: Callable[[], None], trusted: Callable[[], None]
    ) -> None:
        """
        Args:
            suspect_s: Seconds beyond the usual answer time; infinite means that nobody is suspected.
            usual_s: Seconds between two questions to an instance that has work.
            suspected: Called when an answer is overdue, and again each time the limit passes without one.
            trusted: Called on the first timely answer after that.
        """
        self._suspect_s = suspect_s
        self._usual_s = usual_s
        self._suspected = suspected
        self._trusted = trusted
        self._longest_s = 0.0
        self._asked_s = 0.0
        self._answered_s: float | None = None
        self._slices = 0
        self._overdue = False
        self._is_suspect = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether no answer has come in time since one was overdue."""
        return self._is_suspect

    @property
    def limit_s(self) -> float:
        """How long the next answer may take."""
        return self._suspect_s + self._longest_s

    def asked(self) -> None:
        """A question has been sent."""
        self._asked_s = asyncio.get_running_loop().time()
        self._slices = 0
        self._overdue = False
        if self._suspect_s < float("inf"):
            self._wait()

    def answered(self) -> None:
        """Its answer has arrived."""
        self.stop()
        now_s = asyncio.get_running_loop().time()
        took_s = now_s - self._asked_s
        since_s = 0.0 if self._answered_s is None else now_s - self._answered_s
        self._answered_s = now_s
        faded_s = FADING ** max(1.0, since_s / self._usual_s) * self._longest_s
        self._longest_s = max(min(took_s, LONGEST_COUNTED * self._suspect_s), faded_s)
        if self._is_suspect and not self._overdue:
            self._is_suspect = False
            self._trusted()

    def stop(self) -> None:
        """Stop watching: no further questions, or none pending."""
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
