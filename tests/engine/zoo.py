"""
Raw vLLM instances, one of each kind, driven step by step.

`Zoo` owns four instances that differ in what the connector's rules depend on (asynchronous or synchronous scheduling,
prefix caching on or off). All are connected, so each kind is source and target of moves. A pump per instance routes
outputs to their requests, as the runtime does; nothing else of the runtime is involved.

Float32 sums depend on the batch in which a token is computed, by some 1e-5 in a logit. Reference outputs are therefore
made from prompts whose greedy choices all lead the second best by `MIN_MARGIN`: an output that differs is wrong, never
a tie.
"""

import asyncio
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from cascadeinfer.engines.protocol import EngineCounters, EngineDied, EngineRequest, KvTicket, Resume
from support.holds import GO, held_at

if TYPE_CHECKING:  # no vLLM import for tests that are not run
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import FinishReason

    from cascadeinfer.engines.vllm.instance import VllmInstance

BLOCK = 32
"""Tokens per KV block of every test instance."""
EOS_ID = 2
THINK_ID = 500
END_THINK_ID = 502


ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
RUNNER = "V2" if ON_V2 else "V1"
"""The vLLM model runner that these tests use: V1, or V2 with the plugin `tests/support/v2_runner.py`."""
PATIENCE = 10 if ON_V2 else 1
"""Factor on time limits and leases: a step in Triton's interpreter takes about ten times as long."""


@dataclass(frozen=True, slots=True)
class Kind:
    """
    How a kind of instance differs from the others.

    Attributes:
        lease_s: Of pinned blocks. Long, so that a test in which only the end of the lease frees them fails.
        reservation_life_s: Of a reservation that is never claimed; None is the product's default.
    """

    asynchronous: bool
    caches: bool
    lease_s: int = 60 * PATIENCE
    reservation_life_s: float | None = None


ALL_KINDS = {
    "async+cache": Kind(asynchronous=True, caches=True),
    "async": Kind(asynchronous=True, caches=False),
    "sync+cache": Kind(asynchronous=False, caches=True, lease_s=5),
    "sync": Kind(asynchronous=False, caches=False, reservation_life_s=5.0),
}
KINDS = {name: kind for name, kind in ALL_KINDS.items() if kind.asynchronous or not ON_V2}
"""V2 is made for asynchronous scheduling, and its interpreted kernels are slow, so it runs half of the kinds."""
OTHER = dict(zip(KINDS, reversed(KINDS), strict=True))
"""A partner of another kind, for tests that need not try all pairs."""
PAIRS = [(source, target) for source in KINDS for target in KINDS if source != target]
KV_BLOCKS = 512
USABLE_BLOCKS = KV_BLOCKS - 1
"""vLLM keeps one block as its null block."""
MAX_MODEL_LEN = 2048
MAX_SEQS = 64
MAX_BATCHED_TOKENS = 256
"""Long prompts are prefilled in several steps."""
MIN_MARGIN = 5e-4
WINDOW_PROMPT = 8
WINDOW_OUTPUT = 300
"""Length of the text from which `Zoo.window` cuts prompts."""
SETTLE_S = 20.0 * PATIENCE
"""Time limit for everything to be given back; well below the long leases."""
DEADLINE_S = 60.0 * PATIENCE
"""Time limit for all polling: far more than is needed on a busy machine."""


async def eventually(
    condition: Callable[[], Awaitable[bool] | bool], what: Callable[[], str] | str, deadline_s: float = DEADLINE_S
) -> None:
    """Poll until the condition holds; fails the test, naming what it waited for, if the deadline passes."""
    end_s = time.monotonic() + deadline_s
    while True:
        holds = condition()
        if isinstance(holds, Awaitable):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what if isinstance(what, str) else what()}"
        await asyncio.sleep(0.02)


def greedy(max_tokens: int, *, eos_id: int | None = None, **options: Any) -> "SamplingParams":
    """Greedy sampling as the front end would send it; `eos_id` makes that token the end of a sequence."""
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=eos_id is None, **options)
    params.update_from_generation_config({}, EOS_ID if eos_id is None else eos_id)
    return params


def random_prompt(n_tokens: int, seed: int) -> list[int]:
    """Token ids without special tokens."""
    rng = random.Random(f"{n_tokens}:{seed}")
    return [rng.randrange(3, 512) for _ in range(n_tokens)]


def margins_of(delta: Any) -> list[float]:
    """Margin of the best token over the second best, per new token; needs `logprobs=2`."""
    lists = delta.new_logprobs
    return [] if lists is None else [abs(float(row[1] - row[2])) for row in lists.logprobs]


@dataclass(slots=True)
class Attempt:
    """One request on one instance, with what it has sent so far."""

    instance: "VllmInstance"
    engine_request_id: str
    request: EngineRequest
    brought: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: "FinishReason | None" = None
    stop_reason: Any = None
    ticket: KvTicket | None = None
    died: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def output(self) -> list[int]:
        """All output tokens of the request, including those from before this attempt."""
        return self.brought + self.token_ids

    @property
    def n_tokens(self) -> int:
        """Sequence length."""
        return len(self.request.prompt_token_ids) + len(self.output)

    @property
    def ended(self) -> bool:
        """Whether this attempt has had its last output."""
        return self.finish_reason is not None or self.died

    async def until(self, condition: Callable[["Attempt"], bool]) -> None:
        """Wait for outputs until the condition holds or the attempt ends."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self) and not self.ended:
                self.news.clear()
                await self.news.wait()

    async def until_output(self, n_tokens: int) -> None:
        """Wait until this attempt has sent at least this many tokens."""
        await self.until(lambda attempt: len(attempt.token_ids) >= n_tokens)

    async def until_end(self) -> "Attempt":
        """Wait for the final output."""
        await self.until(lambda _: False)
        return self


class Zoo:
    """Connected instances by kind, and the requests on them."""

    def __init__(self, instances: dict[str, "VllmInstance"]) -> None:
        """Take over instances that are started and connected."""
        self.instances = instances
        self._attempts: dict[str, Attempt] = {}
        self._numbers = itertools.count()
        self._pumps: list[asyncio.Task[None]] = []
        self._references: dict[tuple[int, int], tuple[list[int], list[int]]] = {}

    async def __aenter__(self) -> Self:
        """Start listening."""
        self._pumps = [asyncio.create_task(self._pump(instance)) for instance in self.instances.values()]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening; the instances belong to whoever started them."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, instance: "VllmInstance") -> None:
        while True:
            try:
                outputs = await instance.next_outputs()
            except EngineDied:
                for attempt in self._attempts.values():
                    if attempt.instance is instance and not attempt.ended:
                        attempt.died = True
                        attempt.news.set()
                return
            for delta in outputs.outputs:
                attempt = self._attempts.get(delta.request_id)
                if attempt is None or attempt.ended:
                    continue
                attempt.token_ids += delta.new_token_ids
                attempt.margins += margins_of(delta)
                attempt.ticket = instance.ticket_of(delta)
                attempt.finish_reason, attempt.stop_reason = delta.finish_reason, delta.stop_reason
                attempt.news.set()

    async def start(
        self,
        instance: "VllmInstance",
        prompt: Sequence[int],
        params: "SamplingParams",
        *,
        request_id: str | None = None,
        hold_at: int | None = None,
    ) -> Attempt:
        """Send a new request; it waits at the length `hold_at` until it is cut or let go."""
        request_id = request_id or f"r{next(self._numbers)}"
        if hold_at is not None:
            request_id = held_at(request_id, hold_at)
        from cascadeinfer.engines.vllm.plain_request import request_with

        request = request_with(request_id, list(prompt), params)
        return await self._add(Attempt(instance, request_id, request), None)

    async def let_go(self, attempt: Attempt) -> None:
        """A request that is held, or would be, goes on to its end."""
        await attempt.instance.utility("call_utility_async", GO, attempt.engine_request_id)

    async def resume(
        self, old: Attempt, target: "VllmInstance", *, ticket: KvTicket | None, reservation_id: str | None = None
    ) -> Attempt:
        """Resume a request elsewhere (or where it was) from its output so far."""
        new = Attempt(target, f"{old.request.request_id}~{next(self._numbers)}", old.request, brought=old.output)
        return await self._add(new, Resume(old.output, ticket, reservation_id))

    async def _add(self, attempt: Attempt, resume: Resume | None) -> Attempt:
        self._attempts[attempt.engine_request_id] = attempt
        await attempt.instance.add(attempt.engine_request_id, attempt.request, resume)
        return attempt

    async def run(self, instance: "VllmInstance", prompt: Sequence[int], params: "SamplingParams") -> Attempt:
        """Run a request to its end on one instance."""
        return await (await self.start(instance, prompt, params)).until_end()

    async def cut(self, attempt: Attempt) -> bool:
        """Cut a running request and wait for its last output; False if it ended by itself instead."""
        refused = await attempt.instance.cut(attempt.engine_request_id)
        # Its end is coming or has already come (engines do not wait for a slow test); until_end waits for it.
        assert refused in {None, "ending", "unknown"}, refused
        await attempt.until_end()
        return attempt.ticket is not None

    async def move(self, attempt: Attempt, target: "VllmInstance", *, recompute: bool = False) -> Attempt:
        """
        Move a running request; returns the new attempt (the old one, ended, if it could no longer be cut).

        Room is reserved first, as the protocol requires.
        """
        reservation_id = f"v{next(self._numbers)}"
        assert await target.reserve(reservation_id, attempt.n_tokens + 8) is None
        if not await self.cut(attempt):
            await target.release_reservation(reservation_id)
            return attempt
        if recompute:
            await attempt.instance.release_pin(attempt.engine_request_id)
        return await self.resume(
            attempt, target, ticket=None if recompute else attempt.ticket, reservation_id=reservation_id
        )

    async def cut_and_undo(self, attempt: Attempt) -> tuple[Attempt, bool]:
        """
        Cut a request and undo the cut at once.

        Returns:
            The new attempt, and whether the cut was undone. If a step came between the two, the request is taken
            back without its KV cache, as in the migration protocol.
        """
        instance, request_id = attempt.instance, attempt.engine_request_id
        refused, undone = await asyncio.gather(instance.cut(request_id), instance.undo_cut(request_id))
        if refused is not None or undone:
            return attempt, undone
        await attempt.until_end()
        if attempt.ticket is None:
            return attempt, False
        await instance.release_pin(request_id)
        return await self.resume(attempt, instance, ticket=None), False

    async def reference(self, prompt_tokens: int, output_tokens: int) -> tuple[list[int], list[int]]:
        """A prompt and its greedy output of these lengths, free of near ties; made once, on one instance."""
        key = (prompt_tokens, output_tokens)
        if key not in self._references:
            instance = next(iter(self.instances.values()))
            for seed in itertools.count():
                prompt = random_prompt(prompt_tokens, seed)
                alone = await self.run(instance, prompt, greedy(output_tokens, logprobs=2))
                if min(alone.margins) >= MIN_MARGIN:
                    self._references[key] = prompt, alone.output
                    break
        return self._references[key]

    async def window(self, n_prompt: int, n_output: int) -> tuple[list[int], list[int]]:
        """
        A prompt and its greedy output, cut out of one long greedy text.

        The continuation of the first n tokens of a greedy text is the rest of it, so one reference serves every prompt
        length.
        """
        assert WINDOW_PROMPT <= n_prompt <= n_prompt + n_output <= WINDOW_PROMPT + WINDOW_OUTPUT
        prompt, output = await self.reference(WINDOW_PROMPT, WINDOW_OUTPUT)
        text = prompt + output
        return text[:n_prompt], text[n_prompt : n_prompt + n_output]

    async def counters(self, instance: "VllmInstance") -> EngineCounters:
        """The instance's counters so far."""
        return (await instance.report())[1]

    async def settled(self, deadline_s: float = SETTLE_S) -> None:
        """Wait until no instance holds a request, block, pin or reservation, well before a lease would end."""
        for name, instance in self.instances.items():
            await self._holds_nothing(name, instance, deadline_s)
        self._attempts.clear()

    async def _holds_nothing(self, name: str, instance: "VllmInstance", deadline_s: float) -> None:
        held: dict[str, Any] = {}

        async def nothing() -> bool:
            report, counters = await instance.report()
            held.update(
                running=report.running_ids,
                waiting=report.waiting_ids,
                blocks=report.kv_blocks_used,
                pinned=counters.pinned,
                reserved=counters.reserved,
                **counters.held_blocks,
            )
            return not any(held.values())

        await eventually(nothing, lambda: f"{name} holds nothing: {held}", deadline_s)

    async def squeeze(self, instance: "VllmInstance", n_left: int) -> str:
        """Reserve all but this many free blocks, when no request is taking any; returns the reservation's id."""
        reservation_id = f"squeeze{next(self._numbers)}"

        async def reserved() -> bool:
            n_taken = USABLE_BLOCKS - (await instance.report())[0].kv_blocks_used - n_left
            return await instance.reserve(reservation_id, (n_taken - 1) * BLOCK) is None

        await eventually(reserved, f"all but {n_left} blocks reserved")
        return reservation_id
