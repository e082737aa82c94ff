"""Predicted service of a stage, against limiting cases with known answers and against a small step simulation."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import BatchFeatures, StepModel
from cascadeinfer.core.cost.qoe import StageService, longest_of
from cascadeinfer.core.plan.problem import HandOverCost, PlanProblem, ServiceFloor
from cascadeinfer.core.types import InstanceCapacity

ROOMY = InstanceCapacity(kv_blocks=1_000_000, block_size_tokens=16, max_num_seqs=10_000, max_batched_tokens=8192)
DECODE_ONLY = StepModel(
    base_s=0.008, per_decode_s=5e-5, per_kv_token_s=4e-8, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
)
FULL = StepModel(
    base_s=0.007,
    per_decode_s=1.2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=7e-10,
)


def one_stage(
    model: StepModel,
    pairs: list[tuple[int, int]],
    rate: float,
    n: int,
    capacity: InstanceCapacity = ROOMY,
    floor: ServiceFloor | None = None,
) -> StageService:
    """The prediction for one stage of all lengths."""
    histogram = LengthHistogram.from_requests(*zip(*pairs, strict=True))
    problem = PlanProblem(histogram, model, capacity, rate, n, floor=floor or ServiceFloor())
    return problem.service(0, len(problem.edges) - 1, n)


@pytest.mark.parametrize(("n", "load"), [(1, 0.3), (1, 0.7), (8, 0.5), (64, 0.9)])
def test_linear_model_has_the_closed_form(n: int, load: float) -> None:
    """Without prefill work the step time is (base + own / n) / (1 - work / n), by the design's derivation."""
    prompt, output = 1000, 201
    steps = output - 1
    own_s = DECODE_ONLY.per_decode_s + DECODE_ONLY.per_kv_token_s * (prompt + output / 2)
    rate = load * n / (steps * own_s)
    predicted = one_stage(DECODE_ONLY, [(prompt, output)], rate, n).step_s
    assert predicted == pytest.approx((DECODE_ONLY.base_s + own_s / n) / (1.0 - load), rel=1e-3)


def test_an_idle_cluster_costs_a_step_of_one() -> None:
    """At almost no load, a token waits for a step of its own request, and a prompt for its own prefill."""
    predicted = one_stage(FULL, [(4000, 101)], 1e-6, 4)
    alone_s = FULL.step_s(BatchFeatures(1, 4050, 4050))
    prefill_s = FULL.step_s(BatchFeatures(0, 0, 0, 4000, 4000 * 4001 / 2))
    assert predicted.step_s == pytest.approx(alone_s, rel=1e-3)
    assert predicted.ttft_s == pytest.approx(prefill_s, rel=0.03)
    assert predicted.cost == pytest.approx((100 * alone_s + prefill_s) / 101, rel=0.01)


def test_batch_obeys_littles_law() -> None:
    """Requests that decode per instance are arrivals per second and instance times their time in decode."""
    predicted = one_stage(FULL, [(500, 301)], 20.0, 4)
    assert predicted.batch == pytest.approx(20.0 / 4 * 300 * predicted.step_s, rel=1e-4)


@settings(max_examples=60)
@given(
    rate=st.floats(0.5, 60.0),
    n=st.integers(1, 15),
    straggler=st.sampled_from([0.0, 5e-7]),
    pairs=st.lists(st.tuples(st.integers(1, 20_000), st.integers(2, 1000)), min_size=1, max_size=8),
)
def test_more_instances_are_never_slower(rate: float, n: int, straggler: float, pairs: list[tuple[int, int]]) -> None:
    """One more instance lowers the step time, or leaves it unchanged."""
    model = StepModel(
        base_s=0.007,
        per_decode_s=1.2e-5,
        per_kv_token_s=4e-8,
        per_prefill_token_s=2e-5,
        per_prefill_attention_s=7e-10,
        straggler_per_kv_token_s=straggler,
    )
    fewer = one_stage(model, pairs, rate, n).step_s
    more = one_stage(model, pairs, rate, n + 1).step_s
    assert more <= fewer * (1.0 + 1e-3)


@pytest.mark.parametrize(
    ("capacity", "why"),
    [
        (InstanceCapacity(600, 16, 10_000, 8192), "KV cache"),
        (InstanceCapacity(1_000_000, 16, 8, 8192), "batch slots"),
        (InstanceCapacity(1_000_000, 16, 10_000, 64), "token budget"),
    ],
)
def test_what_does_not_fit_is_infeasible(capacity: InstanceCapacity, why: str) -> None:
    """A rate that a roomy instance carries is infeasible with too little KV cache, slots or token budget."""
    pairs = [(1000, 101)]
    assert math.isfinite(one_stage(FULL, pairs, 10.0, 1).cost)
    assert math.isinf(one_stage(FULL, pairs, 10.0, 1, capacity).cost), why


def test_near_its_memory_a_stage_makes_requests_wait() -> None:
    """With little KV cache to spare, the predicted wait grows before the stage becomes infeasible."""
    pairs = [(1000, 101)]
    roomy = one_stage(FULL, pairs, 10.0, 1)
    needed_tokens = roomy.kv_use * ROOMY.kv_tokens
    tight = InstanceCapacity(int(1.35 * needed_tokens / 16), 16, 10_000, 8192)
    assert one_stage(FULL, pairs, 10.0, 1, tight).wait_s > 1.5 * roomy.wait_s


def test_a_floor_excludes_slow_stages() -> None:
    """A stage whose step time or TTFT exceeds the floor is infeasible; a floor just above them changes nothing."""
    pairs = [(1000, 101)]
    free = one_stage(FULL, pairs, 10.0, 1)
    for floor in (ServiceFloor(tpot_s=0.9 * free.step_s), ServiceFloor(ttft_s=0.9 * free.ttft_s)):
        assert math.isinf(one_stage(FULL, pairs, 10.0, 1, floor=floor).cost)
    loose = ServiceFloor(tpot_s=1.1 * free.step_s, ttft_s=1.1 * free.ttft_s)
    assert one_stage(FULL, pairs, 10.0, 1, floor=loose).cost == pytest.approx(free.cost, rel=1e-4)


def test_hand_overs_cost_their_pause() -> None:
    """
    A stage that takes over all requests costs (pause + per token x boundary) / output more than free hand-overs; if
    they are copied ahead, pause / output.
    """
    histogram = LengthHistogram.from_requests([100], [1001], buckets_per_octave=16)
    costs = []
    for hand_over in (HandOverCost(0.0), HandOverCost(0.05, 1e-5), HandOverCost(0.05, 1e-5, copied_ahead=True)):
        problem = PlanProblem(histogram, FULL, ROOMY, 1.0, 2, hand_over=hand_over)
        boundary = histogram.nearest_edge(512)
        costs.append(problem.service(boundary, len(problem.edges) - 1, 1).cost)
    assert costs[1] - costs[0] == pytest.approx((0.05 + 1e-5 * 512) / 1001, rel=1e-6)
    assert costs[2] - costs[0] == pytest.approx(0.05 / 1001, rel=1e-6)


def test_a_stage_that_hands_over_too_often_is_infeasible() -> None:
    """Hand-overs into and out of an instance are limited; more instances or a higher limit make the stage feasible."""
    histogram = LengthHistogram.from_requests([100], [1001])
    boundary = histogram.nearest_edge(512)

    def cost(n: int, per_s: float) -> float:
        problem = PlanProblem(histogram, FULL, ROOMY, 40.0, n, hand_over=HandOverCost(per_instance_per_s=per_s))
        return problem.service(boundary, len(problem.edges) - 1, n).cost

    assert math.isinf(cost(2, 19.0))
    assert math.isfinite(cost(3, 19.0))
    assert math.isfinite(cost(2, 21.0))


def test_quantiles_of_the_longest_are_those_of_draws() -> None:
    """The longest length of a batch, drawn by decode steps, has the computed quantiles."""
    rng = np.random.default_rng(11)
    prompts = rng.integers(100, 20_000, 400)
    outputs = rng.integers(2, 300, 400)
    histogram = LengthHistogram.from_requests(prompts, outputs)
    model = StepModel(
        base_s=1.0,
        per_decode_s=0.0,
        per_kv_token_s=0.0,
        per_prefill_token_s=0.0,
        per_prefill_attention_s=0.0,
        straggler_per_kv_token_s=1.0,
    )
    problem = PlanProblem(histogram, model, ROOMY, 1e-9, 1)
    longest = longest_of(problem.inputs, 0, len(problem.edges) - 1)
    lengths = np.concatenate([np.arange(p + 1, p + o) for p, o in zip(prompts, outputs, strict=True)])
    for doublings in (0, 2, 5):
        draws = rng.choice(lengths, (4000, 2**doublings)).max(axis=1)
        expected = np.quantile(draws, (1 / 6, 1 / 2, 5 / 6))
        assert longest[doublings] == pytest.approx(expected, rel=0.06)


def simulate_one_instance(
    model: StepModel, arrivals: list[float], prompts: list[int], outputs: list[int], budget: int
) -> float:
    """Mean normalised latency on one instance: continuous batching, decode first, chunked prefill by arrival."""
    now, waiting, decoding = 0.0, [], []
    todo = list(zip(arrivals, range(len(arrivals)), strict=True))
    heapq.heapify(todo)
    done = [0] * len(arrivals)
    made = [0] * len(arrivals)
    latency = 0.0
    while todo or waiting or decoding:
        if not waiting and not decoding:
            now = max(now, todo[0][0])
        while todo and todo[0][0] <= now:
            waiting.append(heapq.heappop(todo)[1])
        left, chunks, pairs = budget - len(decoding), [], 0.0
        for r in waiting:
            chunk = min(left, prompts[r] - done[r])
            if chunk <= 0:
                break
            left -= chunk
            pairs += chunk * done[r] + chunk * (chunk + 1) / 2
            chunks.append((r, chunk))
        lengths = [prompts[r] + made[r] for r in decoding]
        tokens = sum(c for _, c in chunks)
        now += model.step_s(BatchFeatures(len(decoding), sum(lengths), max(lengths, default=0), tokens, pairs))
        for r in decoding:
            made[r] += 1
        for r, chunk in chunks:
            done[r] += chunk
            if done[r] == prompts[r]:
                made[r] = 1
                waiting.remove(r)
                decoding.append(r)
        for r in [r for r in decoding if made[r] == outputs[r]]:
            decoding.remove(r)
            latency += (now - arrivals[r]) / outputs[r]
    return latency / len(arrivals)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
def test_prediction_agrees_with_a_step_simulation(load: float) -> None:
    """On one instance, which fluctuates most, the predicted mean normalised latency is within 10 % of simulation."""
    rng = np.random.default_rng(5)
    n = 1500
    prompts = np.minimum(rng.lognormal(6.5, 1.0, n).astype(int) + 1, 20_000)
    outputs = rng.integers(20, 180, n)
    work_s = np.mean(
        (outputs - 1) * (FULL.per_decode_s + FULL.per_kv_token_s * (prompts + outputs / 2))
        + prompts * FULL.per_prefill_token_s
        + prompts * (prompts + 1) / 2 * FULL.per_prefill_attention_s
    )
    rate = load / work_s
    arrivals = np.cumsum(rng.exponential(1.0 / rate, n))
    simulated = simulate_one_instance(FULL, arrivals.tolist(), prompts.tolist(), outputs.tolist(), 8192)
    pairs = list(zip(prompts.tolist(), outputs.tolist(), strict=True))
    assert one_stage(FULL, pairs, rate, 1).cost == pytest.approx(simulated, rel=0.10)
