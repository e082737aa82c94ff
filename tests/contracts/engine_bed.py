"""
What the contract tests need from an engine besides the protocol: valid requests, the expected output, a listener.

A `Bed` is two connected engines and all that belongs to them. The suite (`engine_contract.py`) drives it the same way
for every engine.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cascadeinfer.core.events import InstanceReport
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import Engine, EngineCounters, EngineDied, EngineRequest, KvTicket, Resume

DEADLINE_S = 60.0


class Maker(Protocol):
    """What differs between engines."""

    lease_s: float

    def make_engine(self, name: str) -> Engine:
        """A fresh engine with at least 64 blocks and 4 batch slots."""
        ...

    def now_s(self) -> float:
        """The time on the clock of the engine's user."""
        ...

    def make_request(
        self, request_id: str, n_prompt: int, max_output_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> EngineRequest:
        """A request; the same lengths give the same prompt."""
        ...


@dataclass(slots=True)
class Heard:
    """What one attempt has sent so far."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: Any = None
    ticket: KvTicket | None = None
    dropped: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[["Heard"], bool]) -> "Heard":
        """Wait until the condition holds or the attempt ends."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self) and self.finish_reason is None:
                self.news.clear()
                await self.news.wait()
        return self

    async def until_end(self) -> "Heard":
        """Wait for the final output."""
        return await self.until(lambda _: False)

    async def until_tokens(self, n: int) -> "Heard":
        """Wait for at least this many tokens."""
        return await self.until(lambda heard: len(heard.token_ids) >= n)


class Listener:
    """Routes an engine's outputs to their attempts."""

    def __init__(self, engine: Engine, capacity: InstanceCapacity) -> None:
        """Start to listen to a started engine."""
        self.engine = engine
        self.capacity = capacity
        self.by_attempt: dict[str, Heard] = {}
        self.died = asyncio.Event()
        #: What has come along with outputs: loads, each with the tokens sent until then, by attempt.
        self.loads: list[tuple[InstanceReport, EngineCounters, dict[str, int]]] = []
        self._pump = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            try:
                outputs = await self.engine.next_outputs()
            except EngineDied:
                self.died.set()
                return
            for delta in outputs.outputs:
                heard = self.by_attempt.setdefault(delta.request_id, Heard())
                assert heard.finish_reason is None, "words after the last word"
                heard.token_ids += delta.new_token_ids
                heard.ticket = self.engine.ticket_of(delta)
                if delta.finish_reason is not None:
                    heard.finish_reason = delta.finish_reason
                    heard.dropped = self.engine.has_dropped(delta)
                heard.news.set()
            if (load := self.engine.load_in(outputs)) is not None:
                sent = {name: len(heard.token_ids) for name, heard in self.by_attempt.items()}
                self.loads.append((*load, sent))

    async def add(
        self, attempt: str, request: EngineRequest, resume: Resume | None = None, *, park: bool = False
    ) -> Heard:
        """Run a request on this engine."""
        heard = self.by_attempt[attempt] = Heard()
        await self.engine.add(attempt, request, resume, park=park)
        return heard

    async def holds_nothing(self) -> bool:
        """Whether this engine has no request, block, pin or reservation."""
        report, counters = await self.engine.report()
        held = len(report.running_ids) + len(report.waiting_ids) + report.kv_blocks_used
        return not (held + counters.pinned + counters.reserved + sum(counters.held_blocks.values()))

    async def close(self) -> None:
        """Stop the engine and the listening."""
        await self.engine.stop(5.0)
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Poll until the condition holds."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + DEADLINE_S
    while not await condition():
        assert loop.time() < end_s, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass(slots=True)
class Bed:
    """Two connected engines, `a` and `b`."""

    maker: Maker
    a: Listener
    b: Listener

    @classmethod
    async def make(cls, maker: Maker) -> "Bed":
        """Start and connect two engines."""
        engines = [maker.make_engine(name) for name in ("a", "b")]
        capacities = await asyncio.gather(*(engine.start() for engine in engines))
        await engines[0].connect([engines[1]])
        return cls(maker, Listener(engines[0], capacities[0]), Listener(engines[1], capacities[1]))

    async def close(self) -> None:
        """Stop both."""
        await asyncio.gather(self.a.close(), self.b.close())

    async def settled(self) -> None:
        """Wait until both hold nothing."""
        for listener in (self.a, self.b):
            await eventually(listener.holds_nothing, f"{listener.engine.instance_id} holds nothing")

    async def alone(self, n_prompt: int, max_output_tokens: int) -> list[int]:
        """The output of an undisturbed run."""
        request = self.maker.make_request(f"alone-{n_prompt}-{max_output_tokens}", n_prompt, max_output_tokens)
        heard = await (await self.a.add(request.request_id, request)).until_end()
        assert len(heard.token_ids) == max_output_tokens
        del self.a.by_attempt[request.request_id]
        return heard.token_ids

    async def cut(self, attempt: str, heard: Heard) -> KvTicket:
        """Cut a request that runs at `a`; returns the ticket."""
        assert await self.a.engine.cut(attempt) is None
        await heard.until_end()
        assert heard.ticket is not None
        return heard.ticket
