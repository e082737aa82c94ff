"""
Pictures of the real runtime over simulated engines, recorded in virtual time: what the operator's page shows in tests.

The policy is `cascade` with stages to start with. Requests arrive at random, evenly over the recorded time; their
lengths are log-normal, so that every stage has work. Nothing here is measured: every step takes `Recording.step_s`,
long for many instances, so that their recording costs few steps.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry

from cascadeinfer.core.adapt.boundaries import RefineSettings
from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.events import PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.engines.protocol import EngineRequest
from cascadeinfer.engines.simulated import SimulatedEngine, SimulatedParams, SimulatedTimes
from cascadeinfer.runtime.metrics import RuntimeMetrics
from cascadeinfer.runtime.shell import Runtime
from cascadeinfer.runtime.supervise import SupervisionTimes
from support.virtual_time import run

MAX_TOKENS: Final = 16_384
CAPACITY: Final = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=48, max_batched_tokens=16_384)
MODEL: Final = StepModel(
    base_s=0.02, per_decode_s=1e-4, per_kv_token_s=1e-6, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-9
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """
    What to record.

    Attributes:
        stages: Number of instances per stage.
        boundaries: Between them, in tokens.
        requests_per_s: Arrivals.
        step_s: Of every step; also the time between two reports.
        warm_up_s: Time before the first picture.
        n_pictures: One each virtual second.
        median_tokens, spread: Of the log-normal lengths of prompts; the spread is that of the logarithm.
        output_tokens: Most output of a request.
        troubles: Kill one instance and drain another just before the first picture.
    """

    stages: tuple[int, ...]
    boundaries: tuple[int, ...]
    requests_per_s: float
    step_s: float = 0.05
    warm_up_s: float = 20.0
    n_pictures: int = 8
    median_tokens: float = 700.0
    spread: float = 1.2
    output_tokens: int = 400
    troubles: bool = False

    @property
    def instance_ids(self) -> tuple[str, ...]:
        """Numbers, as the server gives them."""
        return tuple(str(number) for number in range(sum(self.stages)))

    def layout(self) -> StageLayout:
        """The stages at the start."""
        ends = np.cumsum(self.stages)
        groups = tuple(self.instance_ids[end - n : end] for end, n in zip(ends, self.stages, strict=True))
        return StageLayout.from_boundaries(self.boundaries, groups)


ONE: Final = Recording(stages=(1,), boundaries=(), requests_per_s=0.5, n_pictures=3)
TWO: Final = Recording(
    stages=(1, 1), boundaries=(900,), requests_per_s=1.0, spread=0.7, output_tokens=600, n_pictures=10
)
MANY: Final = Recording(
    stages=(26, 20, 12, 6),
    boundaries=(500, 1500, 5000),
    requests_per_s=60.0,
    step_s=0.5,
    warm_up_s=14.0,
    n_pictures=6,
    output_tokens=100,
    troubles=True,
)


def record(recording: Recording) -> list[dict[str, Any]]:
    """The pictures, one virtual second apart; the last has the story of its oldest request under `story`."""
    return run(_record(recording))


async def _record(recording: Recording) -> list[dict[str, Any]]:
    pictures = []
    async with running(recording) as runtime:
        await asyncio.sleep(recording.warm_up_s)
        if recording.troubles:
            _trouble(runtime)
        for _ in range(recording.n_pictures):
            await asyncio.sleep(1.0)
            pictures.append(runtime.lookout.picture())
        pictures[-1]["story"] = runtime.lookout.story(pictures[-1]["requests"]["oldest"][0]["id"])
    return pictures


def _trouble(runtime: Runtime) -> None:
    *_, victim, leaving = (engine for engine in runtime.live_engines() if int(engine.instance_id) < 8)
    victim.kill()
    runtime.elastic.drain(leaving.instance_id, 60.0)


@asynccontextmanager
async def running(recording: Recording) -> AsyncIterator[Runtime]:
    """A started runtime with its clients; stopped at the end, with requests cut off."""
    runtime = Runtime(
        {instance_id: _factory(instance_id, recording.step_s) for instance_id in recording.instance_ids},
        Cascade(
            layout=recording.layout(),
            step_model=MODEL,
            refinement=RefineSettings(min_requests=50),
            planning=PlanSettings(max_tokens=MAX_TOKENS),
        ),
        lambda read: RuntimeMetrics(CollectorRegistry(), read),
        supervision=SupervisionTimes(report_s=recording.step_s, hang_s=30.0, backoff_first_s=30.0),
        clock=asyncio.get_running_loop().time,
    )
    await runtime.start()
    tasks = [asyncio.create_task(_clients(runtime, recording)), asyncio.create_task(_listen(runtime))]
    try:
        yield runtime
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runtime.stop(0.0)


def _factory(instance_id: str, step_s: float) -> Callable[[int], SimulatedEngine]:
    times = SimulatedTimes(step_s=step_s, start_s=1.0, pull_s=0.4)

    def make(n_start: int) -> SimulatedEngine:
        return SimulatedEngine(
            instance_id, n_start, CAPACITY, times=times, max_model_len=MAX_TOKENS, index=int(instance_id)
        )

    return make


async def _clients(runtime: Runtime, recording: Recording) -> None:
    rng = np.random.default_rng(7)
    number = 0
    while True:
        await asyncio.sleep(rng.exponential(1.0 / recording.requests_per_s))
        drawn = rng.lognormal(np.log(recording.median_tokens), recording.spread)
        n_prompt = int(np.clip(drawn, 16, MAX_TOKENS // 2))
        n_output = int(rng.integers(recording.output_tokens // 4, recording.output_tokens))
        pin = PinReason.SEEDED_SAMPLING if number % 9 == 0 else None
        request_id = f"chatcmpl-{rng.integers(1 << 48):012x}"
        await runtime.submit(EngineRequest(request_id, [number % 100] * n_prompt, n_output, SimulatedParams(), pin))
        number += 1


async def _listen(runtime: Runtime) -> None:
    while True:
        await runtime.next_outputs()
