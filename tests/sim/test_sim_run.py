"""`simulate`: what it refuses, and how it ends."""

import numpy as np
import pytest
from sim_builders import MODEL, ROUND_MODEL, config, policy_named

from cascadeinfer.core.effects import Dispatch, Effect, Reject
from cascadeinfer.core.errors import ConfigError, PolicyError, TraceError
from cascadeinfer.core.events import Event, RequestArrived, RequestFinished
from cascadeinfer.core.policies.least_loaded import LeastLoaded
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.run import simulate
from cascadeinfer.sim.settings import NetworkConfig, SimConfig, instance_ids
from cascadeinfer.workload.trace import Trace

TRACE = Trace.from_columns([10, 20], [5, 6], [0.0, 0.1])


class Deaf(LeastLoaded):
    """A policy that ignores every event."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:  # noqa: ARG002
        """See `Policy.handle`."""
        return []


class Saying(LeastLoaded):
    """Answers each arrival with fixed effects."""

    def __init__(self, *effects: Effect) -> None:
        super().__init__()
        self._effects = list(effects)

    def handle(self, event: Event, now_s: float) -> list[Effect]:  # noqa: ARG002
        """See `Policy.handle`."""
        return self._effects if isinstance(event, RequestArrived) else []


def test_a_trace_without_times_is_refused() -> None:
    """The message says what to do."""
    with pytest.raises(TraceError, match="give a rate"):
        simulate(Trace.from_columns([10], [5]), policy_named("least_loaded", 2), config())


def test_a_trace_that_does_not_fit_is_refused() -> None:
    """Requests beyond the context are counted, not silently truncated."""
    trace = Trace.from_columns([10, 4000], [5, 200], [0.0, 1.0])
    with pytest.raises(TraceError, match=r"1 of 2 requests are longer than the context of 4096 tokens: cap the trace"):
        simulate(trace, policy_named("least_loaded", 2), config())
    with pytest.raises(TraceError, match="max_output_tokens, 4"):
        simulate(TRACE, policy_named("least_loaded", 2), config(max_output_tokens=4))


def test_prefix_caching_needs_hashes_that_cover_whole_blocks() -> None:
    """Without hashes, or with hashes of 24 tokens and blocks of 16, nothing can be shared."""
    with pytest.raises(ConfigError, match="needs a trace with prefix hashes"):
        simulate(TRACE, policy_named("least_loaded", 2), config(prefix_caching=True))
    trace = Trace.from_columns([48], [5], [0.0], prefix_hashes=[[1, 2]], prefix_block_tokens=24)
    with pytest.raises(ConfigError, match="no multiple of the block size"):
        simulate(trace, policy_named("least_loaded", 2), config(prefix_caching=True))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"instances": 0}, "at least one instance"),
        ({"kv_bytes_per_token": float("nan")}, "kv_bytes_per_token"),
        ({"network": NetworkConfig(link_bytes_per_s=0.0)}, "link_bytes_per_s"),
        ({"report_interval_s": -1.0}, "report_interval_s"),
        ({"context_tokens": 1 << 20}, "does not fit the KV cache"),
        ({"capacity": InstanceCapacity(4096, 16, 64, 32)}, "cannot decode 64 requests"),
        ({"capacity": InstanceCapacity(4096, 0, 64, 64)}, "at least 1"),
    ],
)
def test_impossible_clusters_are_refused(changes: dict[str, object], complaint: str) -> None:
    """The error names each invalid number."""
    with pytest.raises(ConfigError, match=complaint):
        config(**changes)


@pytest.mark.parametrize(
    ("effect", "complaint"),
    [
        (Dispatch("c", "r0", "nowhere"), "no such instance"),
        (Reject("c", "r0", "full", 1.0), None),
        (Dispatch("c", "r99", "i0"), None),
    ],
)
def test_effects_are_checked(effect: Effect, complaint: str | None) -> None:
    """An unknown instance is the policy's bug; a request that is gone or not yet there is a race and is ignored."""
    trace = Trace.from_columns([10], [5], [0.0])
    if complaint is None:
        simulate(trace, Saying(effect, Reject("c", "r0", "full", 1.0)), config(), check=True)
    else:
        with pytest.raises(PolicyError, match=complaint):
            simulate(trace, Saying(effect), config())


def test_placing_twice_is_an_error() -> None:
    """A request cannot be dispatched twice."""
    twice = Saying(Dispatch("c", "r0", "i0"), Dispatch("c", "r0", "i1"))
    with pytest.raises(PolicyError, match="is on i0 already"):
        simulate(Trace.from_columns([10], [5], [0.0]), twice, config())
    refused = Saying(Dispatch("c", "r0", "i0"), Reject("c", "r0", "full", 1.0))
    with pytest.raises(PolicyError, match="is on i0 already"):
        simulate(Trace.from_columns([10], [5], [0.0]), refused, config())


def test_a_policy_that_forgets_requests_is_found_out() -> None:
    """If nothing happens for long while requests are unfinished, the run raises instead of going on for ever."""
    with pytest.raises(PolicyError, match=r"2 requests are unfinished, the oldest being r0 \(unplaced"):
        simulate(TRACE, Deaf(), config(stall_limit_s=30.0))


def test_refused_requests_are_over_and_said_to_be() -> None:
    """A rejected request ends without a token, and the policy is told, as in the runtime."""
    ends: list[RequestFinished] = []

    def look(_: float, event: object, __: object) -> None:
        if isinstance(event, RequestFinished):
            ends.append(event)

    policy = Saying(Reject("c", "r0", "full", 1.0), Reject("c", "r1", "full", 1.0))
    result = simulate(TRACE, policy, config(), check=True, observer=look)
    assert result.requests.rejected.tolist() == [True, True]
    assert [event.output_tokens for event in ends] == [0, 0]


def test_a_run_can_be_stopped_in_the_middle() -> None:
    """At 0.1 s of 20 + 11 k ms, 8 tokens are out; an unfinished request has no finish time and counts its tokens."""
    trace = Trace.from_columns([100, 10], [50, 10], [0.0, 5.0])
    settings = config(step_model=ROUND_MODEL, stop_s=0.1, instances=1)
    result = simulate(trace, policy_named("least_loaded", 1), settings)
    assert result.requests.finished.tolist() == [False, False]
    assert result.requests.produced_tokens.tolist() == [8, 0]
    assert result.requests.scheduled_s[0] == 0.0
    assert np.isnan(result.requests.scheduled_s[1])


def test_an_empty_trace_is_an_empty_run() -> None:
    """Without arrivals, nothing happens."""
    empty = Trace.from_columns([], [], [])
    result = simulate(empty, policy_named("least_loaded", 2), config())
    assert (len(result.requests), result.end_s, result.events) == (0, 0.0, 0)


def test_progress_is_told() -> None:
    """Progress is reported now and then with the virtual time and finished requests, never backwards."""
    rng = np.random.default_rng(0)
    trace = Trace.from_columns(rng.integers(1, 100, 400), rng.integers(1, 50, 400), np.cumsum(rng.random(400)))
    seen: list[tuple[float, int]] = []
    simulate(trace, policy_named("least_loaded", 2), config(), progress=lambda *told: seen.append(told))
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert 0 < seen[-1][1] <= 400


def test_ids_sort_as_numbers() -> None:
    """The names of 12 instances sort in order as text."""
    ids = instance_ids(12)
    assert ids[0] == "i00"
    assert list(ids) == sorted(ids)
    assert instance_ids(3) == ("i0", "i1", "i2")


def test_the_cap_that_requests_state() -> None:
    """All the remaining context, or the configured cap if that is less."""
    caps: list[int] = []

    def look(_: float, event: object, __: object) -> None:
        if isinstance(event, RequestArrived):
            caps.append(event.max_output_tokens)

    for cap in (None, 4090):
        settings = SimConfig(
            instances=1,
            capacity=InstanceCapacity(4096, 16, 64, 2048),
            step_model=MODEL,
            kv_bytes_per_token=1.0,
            context_tokens=4096,
            max_output_tokens=cap,
        )
        simulate(TRACE, policy_named("least_loaded", 1), settings, observer=look)
    assert caps == [4086, 4076, 4086, 4076]
