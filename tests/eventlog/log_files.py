"""Event logs for tests: a small simulated run with its log, and a way to write lines by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cascadeinfer.core.adapt.replanning import PlanSettings
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import Effect
from cascadeinfer.core.events import Event, RequestArrived
from cascadeinfer.core.layout import RoleLayout, Stage, StageLayout
from cascadeinfer.core.policies.spec import PolicySpec
from cascadeinfer.core.types import InstanceCapacity, LengthRange
from cascadeinfer.eventlog.run_file import write_log_file
from cascadeinfer.eventlog.writer import Header, header_of
from cascadeinfer.sim.faults import Crash, Drain, FaultPlan
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

MODEL = StepModel(
    base_s=0.007, per_decode_s=2e-5, per_kv_token_s=4.2e-8, per_prefill_token_s=2e-5, per_prefill_attention_s=1e-10
)
N_INSTANCES = 3
IDS = instance_ids(N_INSTANCES)
LAYOUT = StageLayout.from_boundaries((60, 140), tuple((i,) for i in IDS))
ROLES = RoleLayout(StageLayout.from_boundaries((140,), ((IDS[1],), (IDS[2],))), (Stage(LengthRange(20), (IDS[0],)),))
SPECS = {
    "cascade": PolicySpec(
        "cascade",
        {
            "layout": LAYOUT,
            "step_model": MODEL,
            "planning": PlanSettings(interval_s=1.0, min_requests=10, max_tokens=2048),
        },
    ),
    "cascade with a queue": PolicySpec("cascade", {"layout": LAYOUT, "max_queued": 3}),
    "static_stages": PolicySpec("static_stages", {"layout": LAYOUT, "retry_s": 0.1}),
    **{name: PolicySpec(name) for name in ("bucket", "least_loaded", "prefix_aware", "round_robin", "vllm_dp")},
    "pd_fixed": PolicySpec("pd_fixed", {"roles": ROLES}),
    "roles": PolicySpec("roles", {"roles": ROLES, "step_model": MODEL}),
    "power_of_two": PolicySpec("power_of_two", {"seed": 7}),
    "static_length": PolicySpec("static_length"),
    "llumnix": PolicySpec("llumnix", {"migrate_steps": 400.0}),
}
FAULTS = FaultPlan(
    crashes=(Crash(at_s=2.0, instance_id=IDS[1], back_after_s=1.0),),
    drains=(Drain(at_s=4.0, instance_id=IDS[2]),),
    message_drop=0.05,
    message_jitter_s=0.01,
)


def header_for(spec: PolicySpec, **changes: object) -> Header:
    """A header for a run on the small cluster."""
    return header_of(spec, source="simulator", instances=IDS, commit=None, **changes)


Seen = list[tuple[Event, list[Effect]]]


def simulated_run(spec: PolicySpec, observer: Callable[..., None], *, requests: int = 120, seed: int = 0) -> None:
    """A run with a crash, a drain and lost messages."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 200, size=requests)
    trace = Trace.from_columns(
        prompts,
        rng.integers(1, 120, size=requests),
        np.cumsum(rng.exponential(1 / 20.0, size=requests)),
        prefix_hashes=[[1000 * (i % 4) + b for b in range(p // 16)] for i, p in enumerate(prompts.tolist())],
        prefix_block_tokens=16,
    )
    config = SimConfig(
        instances=N_INSTANCES,
        capacity=InstanceCapacity(kv_blocks=64, block_size_tokens=16, max_num_seqs=8, max_batched_tokens=256),
        step_model=MODEL,
        kv_bytes_per_token=1e5,
        context_tokens=512,
        prefix_caching=True,
        faults=FAULTS,
        seed=seed,
    )
    simulate(trace, spec.make(), config, observer=observer)


def simulated_log(path: Path, spec: PolicySpec, *, requests: int = 120, seed: int = 0) -> Seen:
    """Write the log of such a run; also returns what happened."""
    seen: Seen = []
    with write_log_file(path, header_for(spec)) as write:

        def observe(now_s: float, event: Event, effects: list[Effect]) -> None:
            write(now_s, event, effects)
            seen.append((event, list(effects)))

        simulated_run(spec, observe, requests=requests, seed=seed)
    return seen


def without_hashes(event: Event) -> Event:
    """The event without the hashes of a prompt, which the log replaces."""
    return replace(event, prefix_hashes=()) if isinstance(event, RequestArrived) else event


def arrival(number: int, **changes: object) -> RequestArrived:
    """A request arrives."""
    return RequestArrived(f"r{number}", f"r{number}", 10, 20, **changes)


def lines_of(path: Path) -> list[bytes]:
    """The file's lines, with their line ends."""
    return path.read_bytes().splitlines(keepends=True)


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    """A file of these lines."""
    path.write_bytes(b"".join(lines))
    return path
