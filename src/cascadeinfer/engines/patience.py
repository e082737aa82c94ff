"""
Time-outs that do not count time during which this process was suspended.

See `cascadeinfer.core.silence`. After a suspension, `asyncio.timeout` and `call_later` fire at once, before any pending
answer can be read; these do not.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from cascadeinfer.core.silence import Silence, oversleeps

T = TypeVar("T")

LOOKS: Final = 10
"""At one's own watch within a time limit."""


async def within(limit_s: float, awaited: Awaitable[T], slept: Callable[[float], None] | None = None) -> T:
    """
    Wait for an answer.

    Args:
        limit_s: For so long, as `Silence` counts it; infinite: for ever.
        awaited: What answers. It is cancelled when the time is over, or when the waiting is.
        slept: Called for every suspension of this process, with its length in seconds.

    Raises:
        TimeoutError: There was none.
    """
    if math.isinf(limit_s):
        return await awaited
    loop = asyncio.get_running_loop()
    silence, look_s = Silence(limit_s), limit_s / LOOKS
    answer = asyncio.ensure_future(awaited)
    try:
        while not answer.done():
            before_s = loop.time()
            await asyncio.wait([answer], timeout=look_s)
            if answer.done():
                break
            if (slept_s := silence.looked(look_s, loop.time() - before_s)) and slept is not None:
                slept(slept_s)
            if silence.is_over:
                raise TimeoutError
    finally:
        if not answer.done():
            answer.cancel()
            await asyncio.wait([answer])
        if not answer.cancelled():
            answer.exception()  # looked at, also where the one who waited was cancelled in the same moment
    return answer.result()


class Alarm:
    """`call_later` that gives everybody another chance when this process has slept over it."""

    def __init__(self, delay_s: float, ring: Callable[[], None]) -> None:
        """
        Args:
            delay_s: After this long.
            ring: What to do then.
        """
        self._delay_s = delay_s
        self._ring = ring
        self._set()

    def _set(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._fire)

    def _fire(self) -> None:
        late_s = asyncio.get_running_loop().time() - self._timer.when()
        if late_s > oversleeps(self._delay_s):
            self._set()
        else:
            self._ring()

    def cancel(self) -> None:
        """Do nothing."""
        self._timer.cancel()

    def when(self) -> float:
        """When it is due, on the loop's clock."""
        return self._timer.when()
