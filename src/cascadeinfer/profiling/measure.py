"""
Brings an engine into a wanted batch and collects the steps that the engine timed.

A kind of batch is reached by sending its requests, with random and therefore different prompts (no prefix is shared, no
expert favoured), and waiting until each has a token: then all decode. The added prompts follow one after another. The
engine reports each step with its batch, so nothing here has to guess what a step was: the ramp, too, is a series of
good samples.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np

from cascadeinfer.core.errors import EngineError
from cascadeinfer.engines.protocol import EngineDied, KvTicket
from cascadeinfer.profiling.grid import DECODE_STEPS, PROMPT_REPEATS, STEPS_BETWEEN_PROMPTS, BatchKind, Room
from cascadeinfer.profiling.log import BatchRun, MeasuredStep
from cascadeinfer.profiling.subject import Subject

REPORT_INTERVAL_S: Final = 0.2
"""Polling interval. The engine keeps the steps in between; a poll between two steps costs about 0.1 ms."""
STALL_S: Final = 300.0
"""An engine that has requests but sends nothing for this long hangs."""
FIRST_ID: Final = 3
"""Lower ids are special tokens in most vocabularies."""


@dataclass(slots=True)
class Progress:
    """
    What one request has produced so far.

    Attributes:
        first_token_s, last_token_s: When the first token and the latest one came, on the event loop's clock.
    """

    tokens: int = 0
    ended: bool = False
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    ticket: KvTicket | None = None
    token_ids: list[int] = field(default_factory=list)


class Meter:
    """Runs batches on one engine. Use it as a context manager: it listens to the engine meanwhile."""

    def __init__(self, subject: Subject, *, seed: int = 0) -> None:
        """
        Args:
            subject: A started engine with nothing running in it.
            seed: Seed of the prompts.
        """
        self.subject = subject
        self._rng = np.random.default_rng(seed)
        self._numbers = itertools.count()
        self._requests: dict[str, Progress] = {}
        self._news = asyncio.Event()
        self._steps: list[MeasuredStep] = []
        self.last_output_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._collect())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(self, kind: BatchKind, round_number: int) -> BatchRun:
        """
        Run one kind of batch.

        Raises:
            EngineError: The engine died or hangs.
        """
        room = Room(self.subject.capacity, self.subject.max_model_tokens)
        await self._report()
        self._steps.clear()
        begun_s = self.now_s()
        output = room.output_tokens(kind) if kind.lengths else 0
        decoding = [await self.send(length, output) for length in kind.lengths]
        await self.until(lambda: all(r.tokens for r in decoding))
        await self._decode_on(decoding, DECODE_STEPS)
        for tokens in kind.prompts:
            for _ in range(PROMPT_REPEATS):
                prompt = await self.send(tokens, 1)
                await self.until_end(prompt)
                await self._decode_on(decoding, STEPS_BETWEEN_PROMPTS)
        await self._report()
        ended_s = self.now_s()
        steps = list(self._steps)
        await self.clear()
        return BatchRun(kind=kind.name, round=round_number, wall_s=ended_s - begun_s, steps=steps)

    async def send(self, prompt_tokens: int, output_tokens: int) -> Progress:
        """Send a request with a random prompt; returns its progress."""
        request_id = f"profile-{next(self._numbers)}"
        return await self.send_prompt(request_id, self.random_prompt(prompt_tokens), output_tokens)

    def random_prompt(self, tokens: int) -> list[int]:
        """Random token ids."""
        ids: list[int] = self._rng.integers(FIRST_ID, self.subject.identity.vocabulary, tokens).tolist()
        return ids

    async def send_prompt(self, request_id: str, prompt: list[int], output_tokens: int) -> Progress:
        """Send a request; returns its progress."""
        progress = self._requests[request_id] = Progress()
        await self.subject.engine.add(request_id, self.subject.make_request(request_id, prompt, output_tokens))
        return progress

    def expect(self, request_id: str) -> Progress:
        """Listen for a request that is sent elsewhere."""
        progress = self._requests[request_id] = Progress()
        return progress

    async def until(self, condition: Callable[[], bool]) -> None:
        """
        Wait for outputs until the condition holds.

        Raises:
            EngineError: The engine died or hangs.
        """
        while not condition():
            self._news.clear()
            try:
                async with asyncio.timeout(STALL_S):
                    await self._news.wait()
            except TimeoutError:
                raise EngineError(
                    f"sent nothing for {STALL_S:g} s", instance_id=self.subject.engine.instance_id
                ) from None
            for task in self._tasks:
                if task.done():
                    task.result()

    async def until_end(self, request: Progress) -> None:
        """Wait for a request's last output. Raises as `until`."""
        await self.until(lambda: request.ended)

    async def clear(self) -> None:
        """Stop what runs and wait until the engine holds nothing."""
        await self.subject.engine.abort([name for name, request in self._requests.items() if not request.ended])
        self._requests.clear()
        while await self._report():  # noqa: ASYNC110 - an engine tells of its end when asked
            await asyncio.sleep(REPORT_INTERVAL_S / 10)

    def now_s(self) -> float:
        """The event loop's clock."""
        return asyncio.get_running_loop().time()

    async def _decode_on(self, decoding: list[Progress], steps: int) -> None:
        goals = [request.tokens + steps for request in decoding]
        await self.until(lambda: all(r.tokens >= goal or r.ended for r, goal in zip(decoding, goals, strict=True)))

    async def _report(self) -> bool:
        """Collect the engine's steps; returns whether it holds requests."""
        report, _ = await self.subject.engine.report()
        self._steps += [
            MeasuredStep(
                s.batch.n_decode,
                s.batch.decode_kv_tokens,
                s.batch.decode_kv_tokens_max,
                s.batch.prefill_tokens,
                s.batch.prefill_attention_tokens,
                s.step_s,
            )
            for s in report.steps
        ]
        return bool(report.running_ids or report.waiting_ids)

    async def _collect(self) -> None:
        try:
            while True:
                await asyncio.sleep(REPORT_INTERVAL_S)
                await self._report()
        finally:
            self._news.set()

    async def _listen(self) -> None:
        engine = self.subject.engine
        try:
            while True:
                outputs = await engine.next_outputs()
                self.last_output_s = self.now_s()
                for delta in outputs.outputs:
                    request = self._requests.get(delta.request_id)
                    if request is None:
                        continue
                    request.first_token_s = request.first_token_s or self.last_output_s
                    request.last_token_s = self.last_output_s
                    request.tokens += len(delta.new_token_ids)
                    request.token_ids += delta.new_token_ids
                    if delta.finish_reason is not None:
                        request.ended = True
                        request.ticket = engine.ticket_of(delta)
                self._news.set()
        except EngineDied as error:
            raise EngineError("died while it was measured", instance_id=engine.instance_id) from error
        finally:
            self._news.set()
