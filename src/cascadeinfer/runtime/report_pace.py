"""
When an instance is asked for its load: rarely while it idles, at once when it is given something then, and while it
steps only if its load does not come by itself.

A question costs the front end the same whether anything has changed, and several times what it costs to read a load
that comes along with outputs (`docs/benchmarks.md`). So:

- An instance that steps sends its load along (`Engine.load_in`), once per busy interval. It is asked after a *lull*:
  `LULL` intervals without a load. The answer is then due as if it had been asked after one, so that silence is found as
  fast as by asking all the time.
- An instance is *quiet* once it has answered twice that it has nothing to do, with nothing in between that could have
  changed that. A quiet instance is asked at the idle interval; that it answers is then all there is to learn. Whoever
  sends something to an instance calls `wake`: the question follows the request at once, so a request never waits longer
  at a silent instance than it would if the instance had been asked all the time.
- Any other is asked at the busy interval.
"""

import asyncio
from typing import Final

from cascadeinfer.core.events import InstanceReport
from cascadeinfer.engines.protocol import EngineCounters

LOUD_REPORTS: Final = 2
"""
After a wake-up, answers that make no instance quiet: the first question may overtake what was sent, the second cannot.
"""
LULL: Final = 3.0
"""Busy intervals; a load comes with the first outputs after one interval, so mostly within two."""


def has_nothing_to_do(report: InstanceReport, counters: EngineCounters) -> bool:
    """Whether an instance has no request, of any front-end process, holds nothing for one, and can be reached."""
    holds = counters.reserved or counters.pinned or any(counters.held_blocks.values())
    return not (report.n_running or report.n_waiting or holds) and counters.listens


class ReportPace:
    """The pace of one instance's reports. See the module header."""

    def __init__(self, busy_s: float, idle_s: float) -> None:
        """
        Args:
            busy_s: Seconds between two reports while the instance has work.
            idle_s: Seconds between two questions while it is quiet; not less than `busy_s` counts.
        """
        self._busy_s = busy_s
        self._idle_s = max(busy_s, idle_s)
        self._last: tuple[InstanceReport, EngineCounters] | None = None
        self._loud_reports = LOUD_REPORTS
        self._answers_needed = 0
        self._is_quiet = False
        self._is_late = False
        self._steps = False
        self._came_s: float | None = None
        self._rest: asyncio.Future[None] | None = None

    def reported(self, report: InstanceReport, counters: EngineCounters, *, in_time: bool = True) -> None:
        """An instance has answered; if it did not do so `in_time`, it is watched closely."""
        told = report, counters
        is_news = self._loud_reports > 0 or told != self._last
        self._is_quiet = in_time and not is_news and has_nothing_to_do(report, counters)
        self._is_late = not in_time
        self._steps = in_time and report.n_running > 0
        self._loud_reports = max(0, self._loud_reports - 1)
        self._answers_needed = max(0, self._answers_needed - 1)
        self._last = told

    def came(self, report: InstanceReport, counters: EngineCounters) -> None:
        """A load has come unasked. The instance is not quiet before it has answered that it has nothing to do."""
        steps = report.n_running > 0 and not self._is_late
        is_other = self._is_quiet or steps != self._steps
        self._is_quiet, self._steps = False, steps
        self._came_s = asyncio.get_running_loop().time()
        self._last = report, counters
        if is_other:
            self._reconsider()

    def wake(self, *, must_answer: bool = False) -> None:
        """
        Something is being sent to the instance.

        Args:
            must_answer: Only the answer to a question asked from now on counts, not a load that comes by itself.
        """
        self._loud_reports = LOUD_REPORTS
        was_quiet, self._is_quiet = self._is_quiet, False
        if must_answer:
            self._answers_needed = LOUD_REPORTS
        if was_quiet or must_answer:
            self._reconsider()

    async def wait(self) -> float:
        """
        Wait until the next question is due; call it when the last one has been answered.

        Returns:
            For how many seconds a report has been due: more than 0 after a lull.
        """
        loop = asyncio.get_running_loop()
        answered_s = loop.time()
        while (left_s := sum(self._due_and_late_s(answered_s)) - loop.time()) > 0.0:
            self._rest = loop.create_future()
            timer = loop.call_later(left_s, self._reconsider)
            try:
                await self._rest
            finally:
                timer.cancel()
                self._rest = None
        return self._due_and_late_s(answered_s)[1]

    def _due_and_late_s(self, answered_s: float) -> tuple[float, float]:
        """When the next report is due, and how long after that a question is; if one was answered then."""
        if self._is_quiet:
            return answered_s + self._idle_s, 0.0
        if self._answers_needed or not self._steps:
            return answered_s + self._busy_s, 0.0
        heard_s = answered_s if self._came_s is None else max(answered_s, self._came_s)
        return heard_s + self._busy_s, (LULL - 1.0) * self._busy_s

    def _reconsider(self) -> None:
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)
