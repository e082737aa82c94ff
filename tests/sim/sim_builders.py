"""Small clusters, traces and a policy that migrates restlessly, for the simulator's tests."""

from dataclasses import replace

import numpy as np

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Effect, MigrationReason, SendMessage, StartMigration
from cascadeinfer.core.events import Event, InstanceReported, MessageReceived, MigrationEnded, TimerFired
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Ask
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.policies.round_robin import RoundRobin
from cascadeinfer.core.policies.static_stages import StaticStages
from cascadeinfer.core.policy import Policy
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.faults import FaultPlan
from cascadeinfer.sim.run import SimResult
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

MODEL = StepModel(
    base_s=0.007,
    per_decode_s=2e-5,
    per_kv_token_s=4.2e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=1e-10,
)
ROUND_MODEL = StepModel(
    base_s=0.010, per_decode_s=0.001, per_kv_token_s=0.0, per_prefill_token_s=0.0001, per_prefill_attention_s=0.0
)
"""Step times that can be added up by hand."""
CAPACITY = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=2048)
TIGHT = InstanceCapacity(kv_blocks=40, block_size_tokens=4, max_num_seqs=6, max_batched_tokens=24)


def config(**changes: object) -> SimConfig:
    """A two-instance cluster with ample room, with these changes."""
    plain = SimConfig(
        instances=2, capacity=CAPACITY, step_model=MODEL, kv_bytes_per_token=131_072.0, context_tokens=4096
    )
    return replace(plain, **changes)


def tight(**changes: object) -> SimConfig:
    """Three instances so small that requests wait and are preempted."""
    plain = SimConfig(
        instances=3,
        capacity=TIGHT,
        step_model=MODEL,
        kv_bytes_per_token=1e6,
        context_tokens=150,
        network=NetworkConfig(link_bytes_per_s=1e9, max_pulls=2, pull_overhead_s=0.002),
        migration=MigrationLimits(room_slack_tokens=4),
    )
    return replace(plain, **changes)


def random_trace(rng: np.random.Generator, n: int, rate_rps: float, *, prompts: int = 60, outputs: int = 60) -> Trace:
    """Poisson arrivals, uniform lengths, and prompts that share prefixes of 8-token blocks."""
    prompt_tokens = rng.integers(1, prompts, size=n)
    families = rng.integers(4, size=n)
    hashes = [
        [1000 * f + b for b in range(p // 8)] for f, p in zip(families.tolist(), prompt_tokens.tolist(), strict=True)
    ]
    return Trace.from_columns(
        prompt_tokens,
        rng.integers(1, outputs, size=n),
        np.cumsum(rng.exponential(1.0 / rate_rps, size=n)),
        prefix_hashes=hashes,
        prefix_block_tokens=8,
    )


class Restless(LeastLoaded):
    """Least loaded, but migrates running requests at random and sends messages, to exercise everything around it."""

    def __init__(self, seed: int, move_probability: float = 0.5) -> None:
        super().__init__()
        self._rng = np.random.default_rng(seed)
        self._move_probability = move_probability
        self._moves = 0
        self.heard = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        if isinstance(event, MessageReceived):
            self.heard += 1
        if isinstance(event, InstanceReported) and self._rng.random() < self._move_probability:
            ids = sorted(self.view.instances)
            target = ids[int(self._rng.integers(len(ids)))]
            running = event.report.running_ids
            effects.append(SendMessage(event.cause, event.instance_id, target, Ask("a", "r", 1, "test")))
            if running and target != event.instance_id:
                request_id = running[int(self._rng.integers(len(running)))]
                self._moves += 1
                move = StartMigration(
                    event.cause, f"m{self._moves}", request_id, event.instance_id, target, MigrationReason.OPERATOR
                )
                request = self.view.requests.get(request_id)
                if request is not None and request.migration_id is None:
                    self.view.carry_out([move])
                effects.append(move)
        return effects


def policy_named(name: str, instances: int, seed: int = 0) -> Policy:
    """A fresh policy; static stages cut the lengths evenly among the instances."""
    if name == "restless":
        return Restless(seed)
    if name in {"static_stages", "cascade"}:
        ids = instance_ids(instances)
        groups = tuple((i,) for i in ids)
        layout = StageLayout.from_boundaries(tuple(30 * (k + 1) for k in range(len(ids) - 1)), groups)
        return Cascade(layout=layout) if name == "cascade" else StaticStages(layout=layout)
    return {"round_robin": RoundRobin, "least_loaded": LeastLoaded}[name]()


POLICY_NAMES = ("round_robin", "least_loaded", "static_stages", "cascade", "restless")


def faulty(seed: int, trace: Trace, instances: int) -> FaultPlan:
    """Crashes, departing clients, lost and late messages."""
    return FaultPlan.draw(np.random.default_rng(seed), instance_ids(instances), len(trace), trace.duration_s + 1.0)


def same(left: SimResult, right: SimResult) -> None:
    """Assert that two runs left exactly the same records."""
    for part in ("requests", "migrations", "samples"):
        one, other = getattr(left, part), getattr(right, part)
        for name in type(one).__dataclass_fields__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{part}.{name}")
    assert left.end_s == right.end_s
    assert left.messages_lost == right.messages_lost


class MoveOnce(LeastLoaded):
    """Least loaded; moves one request from one instance to another at a given time."""

    def __init__(self, at_s: float, request_id: str = "r0", source_id: str = "i0", target_id: str = "i1") -> None:
        super().__init__()
        self._at_s: float | None = at_s
        self._move = StartMigration("test", "m", request_id, source_id, target_id, MigrationReason.OPERATOR)
        self.ended: list[MigrationEnded] = []

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        if isinstance(event, MigrationEnded):
            self.ended.append(event)
        if isinstance(event, TimerFired) and self._at_s is not None and now_s >= self._at_s:
            self._at_s = None
            self.view.carry_out([self._move])
            effects.append(self._move)
        return effects

    def next_timer_s(self) -> float | None:
        """When the move is to start."""
        return self._at_s
