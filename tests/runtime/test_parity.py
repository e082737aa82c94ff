"""
One trace, two shells: the policy decides the same in the simulator and in the runtime.

What follows from the requests themselves must be equal: where each is dispatched, and by which hand-overs it climbs the
stages. What follows from the moment of an instance's report may differ, since simulated instances take turns while
those of the runtime report at the same time: which of several equal instances takes a request, the length at which it
is handed over, and whether it is handed over at all within the last tokens of its life. The second half replays the
runtime's log.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from runtime_cluster import Cluster

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Dispatch, Effect, StartMigration
from cascadeinfer.core.events import Event, MigrationEnded, MigrationOutcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.types import InstanceCapacity, InstanceId, RequestId
from cascadeinfer.engines.simulated import SimulatedTimes
from cascadeinfer.eventlog.reader import LoggedEvent, open_log
from cascadeinfer.eventlog.replay import replay
from cascadeinfer.eventlog.writer import EventLog, header_of
from cascadeinfer.runtime.driver import Observer
from cascadeinfer.runtime.supervise import SupervisionTimes
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig
from cascadeinfer.workload.trace import Trace
from support.virtual_time import virtual_time

STEP_S = 0.01
REPORT_S = 0.05
CAP_TOKENS = 400
CAPACITY = InstanceCapacity(kv_blocks=2048, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=512)
MODEL = StepModel(
    base_s=STEP_S, per_decode_s=0.0, per_kv_token_s=0.0, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
)
"""Every step takes the same time, as with the simulated engine."""
LAST_TOKENS = 60
"""A request crossing a boundary this close to its end may or may not be handed over: bid and cut take a few reports."""
OFTEN = SupervisionTimes(report_s=REPORT_S, hang_s=5.0)
EDGES = (100, 200)


def layout_of(groups: Sequence[Sequence[InstanceId]]) -> StageLayout:
    """Three stages with these instances."""
    return StageLayout.from_boundaries(EDGES, tuple(tuple(group) for group in groups))


SINGLE = layout_of((("i0",), ("i1",), ("i2",)))
PAIRS = layout_of((("i0", "i1"), ("i2", "i3"), ("i4", "i5")))


@dataclass
class Decisions:
    """
    What a policy decided in a run.

    Attributes:
        placed: Per request, the instances it was dispatched to.
        moved: Per request, its completed hand-overs as (source, target).
    """

    placed: dict[RequestId, list[InstanceId]] = field(default_factory=dict)
    moved: dict[RequestId, list[tuple[InstanceId, InstanceId]]] = field(default_factory=dict)

    def __call__(self, _: float, event: Event, effects: Sequence[Effect], failed: str | None = None) -> None:
        """An observer of either shell."""
        assert failed is None
        if isinstance(event, MigrationEnded) and event.outcome is MigrationOutcome.MOVED:
            self.moved.setdefault(event.request_id, []).append((event.source_id, event.target_id))
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.placed.setdefault(effect.request_id, []).append(effect.instance_id)

    def path(self, request_id: RequestId, layout: StageLayout) -> list[int | None]:
        """The stages that a request went through."""
        places = [*self.placed[request_id], *(target for _, target in self.moved.get(request_id, []))]
        return [layout.stage_index_of_instance(place) for place in places]


def mixed_trace(n: int = 60) -> Trace:
    """Poisson arrivals; requests start in every stage, and many outgrow one or two."""
    rng = np.random.default_rng(7)
    prompts = rng.integers(10, 260, size=n)
    return Trace.from_columns(prompts, rng.integers(5, 220, size=n), np.cumsum(rng.exponential(0.08, size=n)))


def in_simulator(trace: Trace, spec: PolicySpec, n_instances: int) -> Decisions:
    """The trace on simulated instances."""
    decisions = Decisions()
    config = SimConfig(
        instances=n_instances,
        capacity=CAPACITY,
        step_model=MODEL,
        kv_bytes_per_token=1e5,
        context_tokens=4096,
        max_output_tokens=CAP_TOKENS,
        network=NetworkConfig(link_bytes_per_s=1e9, pull_overhead_s=0.015),
        report_interval_s=REPORT_S,
    )
    simulate(trace, spec.make(), config, observer=decisions)
    return decisions


async def in_runtime(
    trace: Trace, spec: PolicySpec, n_instances: int, observer: Observer, *, kill_at_row: int | None = None
) -> None:
    """The trace on the runtime with simulated engines; optionally the instance that has just got a request dies."""
    loop = asyncio.get_running_loop()
    async with Cluster(
        spec.make(),
        [f"i{number}" for number in range(n_instances)],
        capacity=CAPACITY,
        times=SimulatedTimes(step_s=STEP_S),
        supervision=OFTEN,
        observer=observer,
    ) as cluster:
        start_s = loop.time()
        columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
        for row, (arrival_s, prompt, output) in enumerate(zip(*columns, strict=True)):
            await asyncio.sleep(max(0.0, start_s + arrival_s - loop.time()))
            if row == kill_at_row:
                cluster[cluster.where(f"r{row - 1}") or "i0"].kill()
            client = await cluster.submit(f"r{row}", prompt, CAP_TOKENS, stop_at=output)
            assert len(client.expected) == output, "another seed, in which no stop token comes early"
        for client in cluster.clients.values():
            await client.until_end()
        await cluster.all_up()


def settled(trace: Trace, row: int) -> bool:
    """Whether a request crosses no boundary in the last tokens of its life."""
    prompt, length = int(trace.prompt_tokens[row]), int(trace.prompt_tokens[row] + trace.output_tokens[row])
    return not any(prompt < edge and length - LAST_TOKENS < edge <= length for edge in EDGES)


DETERMINED = {
    "round_robin": PolicySpec("round_robin"),
    "static_length": PolicySpec("static_length", {"layout": SINGLE}),
    "static_stages": PolicySpec("static_stages", {"layout": SINGLE, "retry_s": 0.05}),
    "cascade": PolicySpec("cascade", {"layout": SINGLE, "refine": False, "rebalance": False}),
}


@pytest.mark.parametrize("name", sorted(DETERMINED))
@virtual_time
async def test_both_shells_decide_the_same(name: str) -> None:
    """With one instance per stage: the same dispatch of every request, the same hand-overs in the same order."""
    trace, spec = mixed_trace(), DETERMINED[name]
    simulated, live = in_simulator(trace, spec, 3), Decisions()
    await in_runtime(trace, spec, 3, live)
    assert live.placed == simulated.placed
    assert len(live.placed) == len(trace)
    compared = [f"r{row}" for row in range(len(trace)) if settled(trace, row)]
    assert len(compared) > 30
    assert {r: live.moved.get(r) for r in compared} == {r: simulated.moved.get(r) for r in compared}
    if name in {"static_stages", "cascade"}:
        assert sum(len(live.moved.get(r, ())) for r in compared) > 20


@pytest.mark.parametrize("name", ["static_stages", "cascade"])
@virtual_time
async def test_both_shells_take_the_same_stages(name: str) -> None:
    """With two instances per stage, where timing decides between them, every request goes through the same stages."""
    options = {"static_stages": {"retry_s": 0.05}, "cascade": {"refine": False, "rebalance": False}}
    trace, spec = mixed_trace(), PolicySpec(name, {"layout": PAIRS, **options[name]})
    simulated, live = in_simulator(trace, spec, 6), Decisions()
    await in_runtime(trace, spec, 6, live)
    compared = [f"r{row}" for row in range(len(trace)) if settled(trace, row)]
    assert {r: live.path(r, PAIRS) for r in compared} == {r: simulated.path(r, PAIRS) for r in compared}
    assert sum(len(live.moved.get(r, ())) for r in compared) > 20


REPLAYED = {
    **DETERMINED,
    "least_loaded": PolicySpec("least_loaded"),
    "vllm_dp": PolicySpec("vllm_dp"),
    "llumnix": PolicySpec("llumnix", {"migrate_steps": 4000.0}),
    "bucket": PolicySpec("bucket", {"interval_s": 0.2}),
    "power_of_two": PolicySpec("power_of_two", {"seed": 7}),
    "cascade that refines": PolicySpec("cascade", {"layout": PAIRS, "step_model": MODEL}),
}


@pytest.mark.parametrize("name", sorted(REPLAYED))
@virtual_time
async def test_the_runtimes_log_replays(name: str, tmp_path: Path) -> None:
    """Replaying the runtime's log, which includes a death, a fresh policy gives the same effects one by one."""
    spec = REPLAYED[name]
    ids = tuple(f"i{number}" for number in range(6))
    header = header_of(spec, source="runtime", instances=ids, commit=None)
    log = EventLog(tmp_path / "log", header, max_bytes=50_000, files=100)
    try:
        await in_runtime(mixed_trace(), spec, 6, log, kill_at_row=40)
    finally:
        log.close()
    reader = open_log(tmp_path / "log")
    done = replay(reader)
    assert done.difference is None
    assert not reader.notes
    assert done.events == log.events
    assert log.dropped == 0
    assert len(reader.paths) > 1
    effects = [effect for entry in reader if isinstance(entry, LoggedEvent) for effect in entry.effects]
    assert done.effects == len(effects)
    assert sum(isinstance(effect, Dispatch) for effect in effects) > 60  # those of the dead instance's twice
    if name in {"static_stages", "cascade"}:
        assert sum(isinstance(effect, StartMigration) for effect in effects) > 10
