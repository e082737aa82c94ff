"""
Runs calculated by hand.

A step takes 10 ms, 1 ms per decoding request and 0.1 ms per prompt token (`ROUND_MODEL`).
"""

from dataclasses import replace

import numpy as np
import pytest
from sim_builders import ROUND_MODEL, MoveOnce, config, policy_named

from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.events import InstanceReported
from cascadeinfer.core.migration import MigrationLimits
from cascadeinfer.core.types import InstanceCapacity
from cascadeinfer.sim.run import SimResult, simulate
from cascadeinfer.sim.settings import NetworkConfig
from cascadeinfer.workload.trace import Trace

NETWORK = NetworkConfig(link_bytes_per_s=1e9, pull_overhead_s=0.005, control_s=0.001)


def run(trace: Trace, **changes: object) -> SimResult:
    """Run on one instance with round step times."""
    changes = {"instances": 1, "step_model": ROUND_MODEL, **changes}
    return simulate(trace, policy_named("least_loaded", 1), config(**changes), check=True)


def test_two_requests_to_the_token() -> None:
    """
    A (100 prompt, 3 output) comes at 0, B (50, 2) at 25 ms.

    A's prompt: [0, 20) ms, token 1 at 20. Decode: [20, 31), token 2. B came at 25, so the next step has A's decode and
    B's prompt: 10 + 1 + 5 = 16 ms, [31, 47): A's token 3 and B's token 1. B alone: [47, 58).
    """
    trace = Trace.from_columns([100, 50], [3, 2], [0.0, 0.025])
    requests = run(trace).requests
    np.testing.assert_allclose(requests.first_token_s, [0.020, 0.047])
    np.testing.assert_allclose(requests.finish_s, [0.047, 0.058])
    np.testing.assert_allclose(requests.scheduled_s, [0.0, 0.031])
    np.testing.assert_allclose(requests.queueing_s, [0.0, 0.006])
    np.testing.assert_allclose(requests.ttft_s, [0.020, 0.022])
    np.testing.assert_allclose(requests.tpot_s, [0.0135, 0.011])
    np.testing.assert_allclose(requests.normalised_latency_s, [0.047 / 3, 0.033 / 2])


def test_a_step_reads_the_kv_cache_of_every_decoding_request() -> None:
    """With 1 ms per KV token on top of 10 ms: a request of 3 prompt tokens decodes at lengths 4, 5, 6."""
    model = StepModel(
        base_s=0.010, per_decode_s=0.0, per_kv_token_s=0.001, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
    )
    requests = run(Trace.from_columns([3], [4], [0.0]), step_model=model).requests
    assert requests.first_token_s[0] == pytest.approx(0.010)
    assert requests.finish_s[0] == pytest.approx(0.010 + 0.014 + 0.015 + 0.016)


def test_a_long_prompt_goes_in_chunks_while_others_decode() -> None:
    """
    Budget 64: A (10, 5) decodes; B has 100 prompt tokens and comes at 5 ms.

    A's prompt [0, 11). Then 1 decode + 63 tokens: 17.3 ms, to 28.3. Then 1 decode + 37 tokens: 14.7 ms, to 43.0: B's
    first token.
    """
    capacity = InstanceCapacity(kv_blocks=4096, block_size_tokens=16, max_num_seqs=64, max_batched_tokens=64)
    trace = Trace.from_columns([10, 100], [5, 1], [0.0, 0.005])
    requests = run(trace, capacity=capacity).requests
    assert requests.first_token_s.tolist() == pytest.approx([0.011, 0.043])
    assert requests.finish_s.tolist() == pytest.approx([0.043 + 0.011 * 2, 0.043])


def test_one_output_token_is_the_end_of_the_prompt() -> None:
    """An output of one token has no decode step."""
    requests = run(Trace.from_columns([100], [1], [0.5])).requests
    assert requests.finish_s[0] == requests.first_token_s[0] == pytest.approx(0.52)
    assert np.isnan(requests.tpot_s[0])


def test_a_migration_to_the_millisecond() -> None:
    """
    One request (100 prompt, 100 output) moves from i0 to i1, asked for at 100 ms.

    Control messages take 1 ms: asked at 101, answered at 102, told to cut at 103. Steps end at 20 + 11 k ms, so the cut
    is at 108 with 9 tokens out. 108 of the 109 tokens are pulled, 1 MB each at 1 GB/s: from 108 + 1 + 5 to 222. i1's
    step ends at 233 with the tenth token; 90 more at 11 ms each.
    """
    trace = Trace.from_columns([100], [100], [0.0])
    policy = MoveOnce(0.1)
    result = simulate(
        trace, policy, config(step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK), check=True
    )
    moves = result.migrations
    assert (moves.outcome, moves.detail, moves.reason) == (("moved",), ("",), ("operator",))
    assert moves.started_s[0] == pytest.approx(0.100)
    assert moves.cut_s[0] == pytest.approx(0.108)
    assert moves.ended_s[0] == pytest.approx(0.233)
    assert moves.pause_s[0] == pytest.approx(0.125)
    assert (moves.tokens[0], moves.pulled_tokens[0]) == (109, 108)
    assert result.requests.finish_s[0] == pytest.approx(0.233 + 90 * 0.011)
    assert result.requests.migrations[0] == 1
    assert result.requests.recomputed_tokens[0] == 0
    assert len(policy.ended) == 1


def test_a_migration_that_is_copied_ahead_to_the_millisecond() -> None:
    """
    The same move, whose full blocks go before the cut: the pause of 125 ms becomes one of 39 ms.

    Granted at 102, the source is asked at 103: it has 108 tokens, and six blocks of 16 are full. The target is told,
    begins at 103 + 2 + 5 = 110 to read 96 MB, is done at 206 and says so at 207. The cut is heard at 208 and takes
    effect at 218 with 19 tokens out. Of 118 tokens, 22 are left: they are pulled from 218 + 1 + 5 to 246. i1's step
    ends at 257.
    """
    policy = MoveOnce(0.1)
    settings = config(
        step_model=ROUND_MODEL,
        kv_bytes_per_token=1e6,
        network=replace(NETWORK, nodes={"i0": "x", "i1": "x"}),
        migration=MigrationLimits(precopy=True),
    )
    result = simulate(Trace.from_columns([100], [100], [0.0]), policy, settings, check=True)
    moves = result.migrations
    assert (moves.outcome, moves.detail) == (("moved",), ("",))
    assert moves.cut_s[0] == pytest.approx(0.218)
    assert moves.pause_s[0] == pytest.approx(0.006 + 0.022 + 0.011)
    assert (moves.tokens[0], moves.pulled_tokens[0]) == (119, 118)
    assert result.requests.finish_s[0] == pytest.approx(0.257 + 80 * 0.011)
    (ended,) = policy.ended
    assert (ended.copied_tokens, ended.pulled_tokens) == (96, 118)
    assert ended.pull_s == pytest.approx(0.207 - 0.102)


def test_what_the_target_has_cached_is_not_pulled() -> None:
    """Of 108 tokens to pull, the target has the six units of 16 that an earlier request with that prompt left there."""
    hashes = [list(range(6))] * 2
    trace = Trace.from_columns([100, 100], [100, 2], [0.0, 0.0], prefix_hashes=hashes, prefix_block_tokens=16)
    result = simulate(
        trace,
        MoveOnce(0.1),
        config(step_model=ROUND_MODEL, kv_bytes_per_token=1e6, network=NETWORK, prefix_caching=True),
        check=True,
    )
    assert result.migrations.outcome == ("moved",)
    assert result.migrations.pulled_tokens[0] == 108 - 96
    assert result.migrations.ended_s[0] == pytest.approx(0.108 + 0.006 + 0.012 + 0.011)


def test_a_cached_prefix_is_not_computed() -> None:
    """The second prompt of 100 computes 4 tokens of it: 96 are cached. It takes 10.4 ms instead of 20."""
    trace = Trace.from_columns(
        [100, 100], [1, 1], [0.0, 1.0], prefix_hashes=[list(range(6))] * 2, prefix_block_tokens=16
    )
    requests = run(trace, prefix_caching=True).requests
    assert requests.ttft_s.tolist() == pytest.approx([0.020, 0.0104])
    assert requests.prefix_hit_tokens.tolist() == [0, 96]


def test_reports_say_what_is_so_between_two_steps() -> None:
    """At 100 ms, in the step [97, 108), the request has 1 + 7 tokens; its blocks hold those and the next step's."""
    reports: list[tuple[float, InstanceReported]] = []

    def look(now_s: float, event: object, _: object) -> None:
        if isinstance(event, InstanceReported):
            reports.append((now_s, event))

    settings = config(instances=1, step_model=ROUND_MODEL)
    trace = Trace.from_columns([100], [20], [0.0])
    result = simulate(trace, policy_named("least_loaded", 1), settings, observer=look)
    at_s, first = reports[0]
    assert at_s == pytest.approx(0.1)
    assert first.report.running_ids == ("r0",)
    assert first.report.running_tokens == (108,)
    assert first.report.kv_blocks_used == 7
    assert first.report.step_s == pytest.approx((0.020 + 7 * 0.011) / 8)
    assert result.samples.mean_tokens[0] == 108
    assert result.samples.running[0] == 1
    assert result.samples.kv_use[0] == pytest.approx(7 / 4096)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.7])
def test_steady_state_has_the_closed_form(load: float) -> None:
    """
    With `step = base + w * requests` and R tokens/s of demand, Little's law gives `step = base / (1 - w * R)`.

    Arrivals find that (they are Poisson) and add themselves: a token's step is `base / (1 - w * R) + w` long.
    """
    rng = np.random.default_rng(0)
    n, output, base_s, per_decode_s = 2000, 200, 0.010, 0.0005
    rate_rps = load / (per_decode_s * output)
    model = StepModel(
        base_s=base_s,
        per_decode_s=per_decode_s,
        per_kv_token_s=0.0,
        per_prefill_token_s=0.0,
        per_prefill_attention_s=0.0,
    )
    trace = Trace.from_columns(np.full(n, 4), np.full(n, output), np.cumsum(rng.exponential(1.0 / rate_rps, n)))
    result = simulate(trace, policy_named("least_loaded", 1), config(instances=1, step_model=model))
    settled = result.requests.arrived_in(0.1 * trace.duration_s, trace.duration_s)
    assert np.mean(settled.tpot_s) == pytest.approx(base_s / (1.0 - load) + per_decode_s, rel=0.03)
