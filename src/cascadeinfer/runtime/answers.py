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
        self._limit_s = suspect_s
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
        """How long the answer to the last question may take."""
        return self._limit_s

    def asked(self, due_before_s: float = 0.0) -> None:
        """
        A question has been sent.

        Args:
            due_before_s: It could have been sent so many seconds ago, and the answer is due as if it had been.
        """
        self._asked_s = asyncio.get_running_loop().time() - due_before_s
        self._slices = 0
        self._overdue = False
        self._limit_s = self._suspect_s + self._longest_s
        if self._answered_s is not None:
            rest_s = self._asked_s - self._answered_s - self._usual_s
            self._limit_s = self._suspect_s + self._longest_s * self._faded_by(max(0.0, rest_s))
        if self._suspect_s < float("inf"):
            self._wait(due_before_s)

    def answered(self) -> None:
        """Its answer has arrived."""
        self.stop()
        now_s = asyncio.get_running_loop().time()
        took_s = now_s - self._asked_s
        since_s = 0.0 if self._answered_s is None else now_s - self._answered_s
        self._answered_s = now_s
        faded_s = self._longest_s * self._faded_by(max(self._usual_s, since_s))
        self._longest_s = max(min(took_s, LONGEST_COUNTED * self._suspect_s), faded_s)
        if self._is_suspect and not self._overdue:
            self._is_suspect = False
            self._trusted()

    def _faded_by(self, time_s: float) -> float:
        return float(FADING ** (time_s / self._usual_s))

    def stop(self) -> None:
        """Stop watching: no further questions, or none pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, less_s: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        slice_s = self.limit_s / SLICES
        wait_s = max(0.0, slice_s - less_s)
        self._timer = loop.call_later(wait_s, self._look, loop.time() + wait_s, slice_s)

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
