"""Runs a trace through a policy in one call and returns the records."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from cascadeinfer.core.errors import ConfigError, TraceError
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.policy import Policy
from cascadeinfer.results.records import InstanceSamples, MigrationRecords, RequestRecords
from cascadeinfer.sim.checkers import Checker
from cascadeinfer.sim.cluster import SimCluster
from cascadeinfer.sim.policy_loop import Observer
from cascadeinfer.sim.recording import request_records
from cascadeinfer.sim.settings import SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

PROGRESS_EVENTS: Final = 2048
"""Clock events between two calls of `progress`: a few per second of real time."""


@dataclass(frozen=True, slots=True, eq=False)
class SimResult:
    """
    The results of a run.

    Attributes:
        requests: One row per request of the trace.
        migrations: One row per migration that started and ended.
        samples: One row per report of an instance.
        layouts: Stage layouts with the time from which each was in force.
        shared_s: When a backlog sent a request to another place than its stage's, in order.
        end_s: Virtual time at the end.
        steps: Steps of all instances present at the end.
        events: Clock events processed.
        messages_sent: Bid-ask messages sent.
        messages_lost: Of those, lost on the way or sent to dead instances.
    """

    requests: RequestRecords
    migrations: MigrationRecords
    samples: InstanceSamples
    layouts: tuple[tuple[float, StageLayout], ...]
    shared_s: tuple[float, ...]
    end_s: float
    steps: int
    events: int
    messages_sent: int
    messages_lost: int


def simulate(
    trace: Trace,
    policy: Policy,
    config: SimConfig,
    *,
    check: bool = False,
    progress: Callable[[float, int], None] | None = None,
    observer: Observer | None = None,
) -> SimResult:
    """
    Run a trace through a policy on a simulated cluster until every request is over, or `config.stop_s`.

    Args:
        trace: With arrival times, and no request longer than the context.
        policy: Fresh; it is driven by this run alone.
        config: The cluster.
        check: Check all invariants after every event (slow: for tests).
        progress: Called now and then with the virtual time and the number of requests that are over.
        observer: Called with each event's time, the event, and the effects it led to.

    Returns:
        Records of requests, migrations and instances.

    Raises:
        TraceError: The trace has no arrival times, or requests that do not fit the context.
        ConfigError: Prefix hashes do not fit the block size.
        PolicyError: The policy asked for something impossible, or left requests unplaced for ever.
    """
    check_fit(trace, config)
    cluster = SimCluster(trace, policy, config, observer)
    checker = Checker() if check else None
    while cluster.step():
        if checker is not None:
            checker.check(cluster)
        if progress is not None and cluster.kernel.events % PROGRESS_EVENTS == 0:
            progress(cluster.kernel.now_s, len(cluster.requests) - len(cluster.live))
    cluster.settle()
    return SimResult(
        requests=request_records(trace, cluster.requests),
        migrations=cluster.recorder.migrations(),
        samples=cluster.recorder.samples(),
        layouts=tuple(cluster.recorder.layouts),
        shared_s=tuple(cluster.recorder.shared_s),
        end_s=cluster.kernel.now_s,
        steps=sum(instance.steps_done for instance in cluster.fleet.instances.values()),
        events=cluster.kernel.events,
        messages_sent=cluster.messages_sent,
        messages_lost=cluster.messages_lost,
    )


def check_fit(trace: Trace, config: SimConfig) -> None:
    """
    Refuse a trace that this cluster cannot run.

    Raises:
        TraceError: It has no arrival times, or requests that do not fit the context or state too small a cap.
        ConfigError: Its prefix hashes cover no whole number of an instance's blocks.
    """
    trace.require_arrivals()
    too_long = int(np.count_nonzero(trace.total_tokens > config.context_tokens))
    if too_long:
        raise TraceError(
            f"{too_long} of {len(trace)} requests are longer than the context of {config.context_tokens} tokens: "
            "cap the trace (Trace.capped)"
        )
    cap = config.max_output_tokens
    if cap is not None and len(trace) and int(trace.output_tokens.max()) > cap:
        raise TraceError(f"some requests produce more than max_output_tokens, {cap}")
    if config.prefix_caching:
        if trace.prefix_hashes is None:
            raise ConfigError("prefix caching needs a trace with prefix hashes", option="prefix_caching")
        kinds = [config.kind_of(instance_id).kind for instance_id in instance_ids(config.instances)]
        for block_tokens in sorted({kind.capacity.block_size_tokens for kind in kinds}):
            if trace.prefix_block_tokens % block_tokens:
                raise ConfigError(
                    f"a prefix hash covers {trace.prefix_block_tokens} tokens, which is no multiple of the block size "
                    f"{block_tokens}",
                    option="block_size_tokens",
                )
