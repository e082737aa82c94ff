"""
Migrations made as late as possible: does a stream ever get tokens from blocks that are no longer pinned?

    python benchmarks/forced_lease.py [--repetitions 20] [--controls 3] [--from-hearing 3] [--name forced_lease]

Two real vLLM instances with the tiny model, little room and no prefix cache, under the runtime. A repetition moves one
request. When the front end learns of the cut, the target is stopped (SIGSTOP) and the front end stands still for 4.7 s;
then other requests fill the source, so that they get the moved request's blocks when its lease of 10 s ends; the target
resumes 10.4 s after the cut. In the controls nothing is late, or only the front end, or only the target and within the
limit.

`--from-hearing` repetitions show that the scene is effective: they count the deadline from when the front end *learned*
of the cut, as an earlier rule did, and the stream gets another request's KV cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import measuring

if TYPE_CHECKING or __name__ == "__main__":
    # The engines' processes import this file again (spawn) and need none of it.
    measuring.quiet_environment()
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

    from cascadeinfer.core.effects import Effect, MigrationReason, StartMigration
    from cascadeinfer.core.events import Event, MigrationEnded, TimerFired
    from cascadeinfer.core.migration import MigrationLimits
    from cascadeinfer.core.placing.dispatch import Chosen
    from cascadeinfer.core.policies.least_loaded import LeastLoaded
    from cascadeinfer.core.view import InstanceView, RequestView
    from cascadeinfer.engines.protocol import KvTicket
    from cascadeinfer.engines.vllm.configuration import KvTransferSettings
    from cascadeinfer.engines.vllm.launch import make_factories
    from cascadeinfer.engines.vllm.plain_request import request_with
    from cascadeinfer.runtime.metrics import RuntimeMetrics
    from cascadeinfer.runtime.shell import Runtime
    from cascadeinfer.runtime.supervise import SupervisionTimes
else:
    LeastLoaded = object

LEASE_S = 10
MARGIN_S = 3
PROMPT_TOKENS = 150
OUTPUT_TOKENS = 60
TOKENS_BEFORE = 8
FILLERS = 4
"""Streams of requests that fill the source; each sends one request after another."""
KV_BLOCKS = 128
MAX_MODEL_TOKENS = 2048
SOURCE, TARGET = "0", "1"


@dataclass(frozen=True)
class Scene:
    """
    Which parts are late.

    Attributes:
        front_end_s: How long the front end stands still when it learns of the cut.
        target_s: When the target resumes, after the cut; 0 if it is not stopped.
        from_hearing: Count the deadline from when the front end learns of the cut.
    """

    front_end_s: float = 0.0
    target_s: float = 0.0
    from_hearing: bool = False


SCENES = {
    "both late": Scene(4.7, 10.4),
    "both late, deadline from hearing": Scene(4.7, 10.4, from_hearing=True),
    "nobody late": Scene(),
    "front end late": Scene(4.7),
    "target late": Scene(0.0, 4.0),
}
CONTROLS = ("nobody late", "front end late", "target late")


class Placed(LeastLoaded):
    """Puts every request on the source, and migrates on demand."""

    def __init__(self) -> None:
        """Start without pending migrations."""
        super().__init__()
        self.asked: list[Effect] = []
        self.ended: list[MigrationEnded] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Least loaded, plus the migrations asked for."""
        if isinstance(event, MigrationEnded):
            self.ended.append(event)
        effects = super().handle(event, now_s)
        asked, self.asked = self.asked, []
        self.view.carry_out(asked)
        return effects + asked

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The source while it is up."""
        source = next((c for c in candidates if c.instance_id == SOURCE), None)
        return super().choose(request, candidates) if source is None else Chosen(source)


class Clients:
    """Clients that wait for tokens."""

    def __init__(self, runtime: Runtime) -> None:
        """Start to listen."""
        self._runtime = runtime
        self._tokens: dict[str, list[int]] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._news = asyncio.Condition()
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            outputs = await self._runtime.next_outputs()
            async with self._news:
                for delta in outputs.outputs:
                    self._tokens[delta.request_id] += delta.new_token_ids
                    if delta.finish_reason is not None:
                        self._ended[delta.request_id].set()
                self._news.notify_all()

    async def send(self, request_id: str, prompt: list[int], n_tokens: int) -> None:
        """Submit a greedy request of exactly this length."""
        sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        self._tokens[request_id], self._ended[request_id] = [], asyncio.Event()
        await self._runtime.submit(request_with(request_id, prompt, sampling))

    async def until_tokens(self, request_id: str, n_tokens: int) -> None:
        """Wait for this many tokens."""
        async with self._news:
            await self._news.wait_for(lambda: len(self._tokens[request_id]) >= n_tokens)

    async def until_end(self, request_id: str) -> list[int]:
        """Wait for the end; returns all tokens."""
        await self._ended[request_id].wait()
        return self._tokens[request_id]

    async def stop(self) -> None:
        """Stop listening."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Stage:
    """The runtime, and the means to delay its parts."""

    def __init__(self, runtime: Runtime, policy: Placed, clients: Clients) -> None:
        """Take over a started runtime."""
        self._runtime = runtime
        self._policy = policy
        self._clients = clients
        self._rng = np.random.default_rng(0)

    async def play(self, name: str, scene: Scene) -> dict[str, Any]:
        """Play one repetition; returns whether the tokens are right, and how the migration ended."""
        prompt = measuring.random_prompt(self._rng, PROMPT_TOKENS)
        await self._clients.send(f"{name}-alone", prompt, OUTPUT_TOKENS)
        expected = list(await self._clients.until_end(f"{name}-alone"))
        began_s = time.monotonic()
        fillers: list[asyncio.Task[None]] = []
        with self._late(scene, lambda: fillers.extend(self._fill(name))):
            await self._clients.send(name, prompt, OUTPUT_TOKENS)
            await self._clients.until_tokens(name, TOKENS_BEFORE)
            reason = MigrationReason.OPERATOR
            self._policy.asked.append(StartMigration("forced", name, name, SOURCE, TARGET, reason))
            self._runtime._driver.emit(TimerFired("forced"))  # noqa: SLF001 - nobody else asks for a move
            tokens = await self._clients.until_end(name)
        if scene.target_s:  # it may have ended before the target goes on
            await asyncio.sleep(max(0.0, began_s + scene.target_s + 1.0 - time.monotonic()))
        for filler in fillers:
            filler.cancel()
        await asyncio.gather(*fillers, return_exceptions=True)
        self._runtime.abort([stream.request.request_id for stream in self._runtime._streams])  # noqa: SLF001 - the fillers
        (ended,) = (event for event in self._policy.ended if event.migration_id == name)
        wrong = next((i for i, pair in enumerate(zip(expected, tokens, strict=True)) if pair[0] != pair[1]), None)
        return {"outcome": ended.outcome.value, "detail": ended.detail, "first_wrong_token": wrong}

    @contextlib.contextmanager
    def _late(self, scene: Scene, fill: Any) -> Any:
        """Within this context, the news of a cut stops the target and the front end."""
        migrator = self._runtime._migrator  # noqa: SLF001 - its news are made late
        heard = migrator.cut_took_effect
        target = self._runtime.fleet.engine(TARGET)
        assert target is not None
        pid = target.pid
        assert pid is not None

        def hear_late(migration_id: str, ticket: KvTicket) -> None:
            if scene.target_s:
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(scene.target_s, os.kill, (pid, signal.SIGCONT)).start()
            time.sleep(scene.front_end_s)
            if scene.from_hearing:
                migrator._records[migration_id].migration.cut_sent_s = time.monotonic()  # noqa: SLF001 - as above
            heard(migration_id, ticket)
            fill()

        migrator.cut_took_effect = hear_late  # type: ignore[method-assign]
        try:
            yield
        finally:
            migrator.cut_took_effect = heard  # type: ignore[method-assign]

    def _fill(self, name: str) -> list[asyncio.Task[None]]:
        async def one_after_the_other(number: int) -> None:
            for turn in range(1000):
                request_id = f"{name}-filler{number}-{turn}"
                await self._clients.send(request_id, measuring.random_prompt(self._rng, 700), 40)
                await self._clients.until_end(request_id)

        return [asyncio.create_task(one_after_the_other(number)) for number in range(FILLERS)]


async def run_all(repetitions: dict[str, int]) -> list[dict[str, Any]]:
    """Start, play every scene as often as requested, stop; one row per scene."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = measuring.tiny_engine_args(Path(folder), max_model_tokens=MAX_MODEL_TOKENS, kv_blocks=KV_BLOCKS)
        arguments["enable_prefix_caching"] = False
        factories = make_factories(
            AsyncEngineArgs(**arguments), (SOURCE, TARGET), KvTransferSettings(LEASE_S), log_stats=False
        )
        policy = Placed()
        registry = CollectorRegistry()
        runtime = Runtime(
            factories,
            policy,
            lambda read: RuntimeMetrics(registry, read),
            supervision=SupervisionTimes(hang_s=60.0),
            migration=MigrationLimits(resume_s=LEASE_S - MARGIN_S),
        )
        await runtime.start()
        clients = Clients(runtime)
        try:
            stage = Stage(runtime, policy, clients)
            rows = []
            for scene, times in repetitions.items():
                played = [await stage.play(f"{scene}-{number}", SCENES[scene]) for number in range(times)]
                rows.append({"scene": scene, **asdict(SCENES[scene]), **summary(played), "played": played})
                print(row_of(rows[-1]), flush=True)
            return rows
        finally:
            await clients.stop()
            await runtime.stop(5.0)


def summary(played: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of repetitions, number with wrong tokens, and how migrations ended."""
    endings = [f"{one['outcome']} {one['detail']}".strip() for one in played]
    return {
        "n": len(played),
        "wrong": sum(one["first_wrong_token"] is not None for one in played),
        "endings": {ending: endings.count(ending) for ending in sorted(set(endings))},
    }


def row_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    return f"| {row['scene']} | {row['n']} | {row['wrong']} | {row['endings']} |"


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="with everybody late")
    parser.add_argument("--controls", type=int, default=3, help="repetitions of each control")
    parser.add_argument("--from-hearing", type=int, default=3, help="repetitions with the rule of before")
    parser.add_argument("--name", default="forced_lease", help="of the file of results")
    options = parser.parse_args()
    host = measuring.machine()
    repetitions = {
        **dict.fromkeys(CONTROLS, options.controls),
        "both late, deadline from hearing": options.from_hearing,
        "both late": options.repetitions,
    }
    rows = asyncio.run(run_all({scene: times for scene, times in repetitions.items() if times}))
    settings = {"lease_s": LEASE_S, "margin_s": MARGIN_S, "kv_blocks": KV_BLOCKS, "fillers": FILLERS}
    print(measuring.write_results(options.name, host, settings, rows))


if __name__ == "__main__":
    main()
