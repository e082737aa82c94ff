"""
When an instance is asked for its load: often while it has work, rarely while it idles, at once when it is given some.

A question costs the front end the same whether anything has changed, so most of what hundreds of idle instances cost
was asking them. An instance is *quiet* once it has reported twice that it has nothing to do, with nothing in between
that could have changed that. A quiet instance is asked at the idle interval; that it answers is then all there is to
learn. Whoever sends something to an instance calls `wake`: the question follows the request at once, so a request never
waits longer at a silent instance than it would if the instance had been asked all the time.
"""

import asyncio
from typing import Final

from cascadeinfer.core.events import InstanceReport
from cascadeinfer.engines.protocol import EngineCounters

LOUD_REPORTS: Final = 2
"""
After a wake-up, reports that make no instance quiet: the first question may overtake what was sent, the second cannot.
"""


def has_nothing_to_do(report: InstanceReport, counters: EngineCounters) -> bool:
    """Whether an instance has no request, of any front-end process, holds nothing for one, and can be reached."""
    holds = counters.reserved or counters.pinned or any(counters.held_blocks.values())
    return not (report.n_running or report.n_waiting or holds) and counters.listens


class ReportPace:
    """The pace of one instance's reports. See the module header."""

    def __init__(self, busy_s: float, idle_s: float) -> None:
        """
        Args:
            busy_s: Seconds between two questions while the instance has work.
            idle_s: Seconds between two questions while it is quiet; not less than `busy_s` counts.
        """
        self._busy_s = busy_s
        self._idle_s = max(busy_s, idle_s)
        self._last: tuple[InstanceReport, EngineCounters] | None = None
        self._loud_reports = LOUD_REPORTS
        self._is_quiet = False
        self._rest: asyncio.Future[None] | None = None

    def reported(self, report: InstanceReport, counters: EngineCounters, *, in_time: bool = True) -> None:
        """An instance has reported; if it was not `in_time`, it is watched closely."""
        told = report, counters
        is_news = self._loud_reports > 0 or told != self._last
        self._is_quiet = in_time and not is_news and has_nothing_to_do(report, counters)
        self._loud_reports = max(0, self._loud_reports - 1)
        self._last = told

    def wake(self) -> None:
        """Something is being sent to the instance, or its answer matters now."""
        self._loud_reports = LOUD_REPORTS
        self._is_quiet = False
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    async def wait(self) -> int:
        """
        Wait until the next question is due; call it when the last one has been answered.

        Returns:
            For how many busy intervals it has waited, at least 1.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        left_s = self._busy_s
        if self._is_quiet:
            self._rest = loop.create_future()
            timer = loop.call_later(self._idle_s, _end, self._rest)
            try:
                await self._rest
            finally:
                timer.cancel()
                self._rest = None
            left_s -= loop.time() - began_s
        if left_s > 0.0:
            await asyncio.sleep(left_s)
        return max(1, round((loop.time() - began_s) / self._busy_s))


def _end(rest: "asyncio.Future[None]") -> None:
    if not rest.done():
        rest.set_result(None)
