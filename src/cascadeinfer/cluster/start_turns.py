"""
Starts on shared devices, one after the other.

An engine measures at its start how much of its device's memory is free, and takes the rest for its KV cache. Two that
measure at the same time see each other's weights come and go and get it wrong: one takes too much, or refuses to start.
So a start waits for the earlier ones on any of its devices, until each has allocated its KV cache or has been stopped.
A start that hangs holds the others up for a limited time only. Starts without a common device never wait.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from cascadeinfer.core.errors import EngineError
from cascadeinfer.core.silence import Silence
from cascadeinfer.core.types import InstanceId

logger = logging.getLogger(__name__)

LOOKS = 10
"""At the clock, within the time limit."""


@dataclass(slots=True, eq=False)
class Turn:
    """
    One start's place in the queue.

    Attributes:
        instance_id: Whose start it is.
        devices: What it needs for itself while it starts.
        begun: Whether it starts already.
        out_of_the_way: Set once no other start waits for it any more.
    """

    instance_id: InstanceId
    devices: frozenset[str]
    begun: bool = False
    out_of_the_way: asyncio.Event = field(default_factory=asyncio.Event)


class StartTurns:
    """All starts that have arrived and are still in the way of later ones, in order of arrival."""

    def __init__(self, limit_s: float) -> None:
        """
        Args:
            limit_s: How long others wait for a start that has begun. Time during which this process was suspended does
                not count.
        """
        self._limit_s = limit_s
        self._turns: list[Turn] = []

    def arrive(self, instance_id: InstanceId, devices: str) -> Turn:
        """Queue a start on these devices, whose names are separated by commas."""
        turn = Turn(instance_id, frozenset(devices.split(",")))
        self._turns.append(turn)
        return turn

    def in_the_way_of(self, turn: Turn) -> Turn | None:
        """The first earlier start with a device in common, or None."""
        earlier = self._turns[: self._turns.index(turn)] if turn in self._turns else []
        return next((other for other in earlier if other.devices & turn.devices), None)

    async def come(self, turn: Turn) -> None:
        """
        Wait until this start may begin; it is then in the way of later ones until it leaves.

        Raises:
            EngineError: It has left meanwhile.
        """
        try:
            while (other := self.in_the_way_of(turn)) is not None:
                logger.info(
                    "instance %s starts once instance %s has: they share a device", turn.instance_id, other.instance_id
                )
                await self._outwait(other, turn)
        except BaseException:
            self.leave(turn)
            raise
        if turn.out_of_the_way.is_set():
            raise EngineError("stopped while starting", instance_id=turn.instance_id)
        turn.begun = True

    def leave(self, turn: Turn) -> None:
        """It has its memory, or does not start after all: later starts need not wait for it. Idempotent."""
        if turn in self._turns:
            self._turns.remove(turn)
        turn.out_of_the_way.set()

    async def _outwait(self, other: Turn, turn: Turn) -> None:
        """Wait until the other start, or this one, is out of the way; see to it when the other's time is over."""
        loop = asyncio.get_running_loop()
        silence, look_s = Silence(self._limit_s), self._limit_s / LOOKS
        news = [asyncio.ensure_future(one.out_of_the_way.wait()) for one in (other, turn)]
        try:
            while True:
                before_s, had_begun = loop.time(), other.begun
                done, _ = await asyncio.wait(news, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return
                if had_begun:
                    silence.looked(look_s, loop.time() - before_s)
                if silence.is_over:
                    logger.warning(
                        "instance %s is still starting after %g s: instance %s, which shares a device with it, starts",
                        other.instance_id,
                        self._limit_s,
                        turn.instance_id,
                    )
                    self.leave(other)
                    return
        finally:
            for waiting in news:
                waiting.cancel()
            await asyncio.wait(news)
