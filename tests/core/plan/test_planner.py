"""Plans, predictions, capacity and their explanation."""

import math

import numpy as np
import pytest

from cascadeinfer.core.cost.histogram import LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import Proposal, StageLayout
from cascadeinfer.core.plan.explain import explain
from cascadeinfer.core.plan.objective import MeanNormalizedLatency, SloAttainment, WeightedLatency
from cascadeinfer.core.plan.planner import Plan, capacity_rate, plan, predict
from cascadeinfer.core.plan.problem import HandOverCost, PlanProblem, ServiceFloor
from cascadeinfer.core.types import InstanceCapacity

CAPACITY = InstanceCapacity(kv_blocks=25_000, block_size_tokens=16, max_num_seqs=1024, max_batched_tokens=8192)
MODEL = StepModel(
    base_s=0.007,
    per_decode_s=1.2e-5,
    per_kv_token_s=4e-8,
    per_prefill_token_s=2e-5,
    per_prefill_attention_s=7e-10,
)
RNG = np.random.default_rng(1)
MIXED = LengthHistogram.from_requests(
    np.minimum(RNG.lognormal(6.0, 1.6, 5000).astype(int) + 1, 60_000), RNG.geometric(1 / 300, 5000)
)
ALIKE = LengthHistogram.from_requests(RNG.integers(900, 1100, 500), RNG.integers(150, 250, 500))


def mixed_plan(load: float = 0.7, n: int = 16, **options: object) -> Plan:
    """A plan for mixed lengths, at a share of the one-stage capacity."""
    return plan(MIXED, MODEL, CAPACITY, load * capacity_rate(MIXED, MODEL, CAPACITY, n), n, **options)


def test_mixed_lengths_get_stages_and_alike_ones_do_not() -> None:
    """Mixed lengths are split into stages for a gain well above the margin; similar lengths stay in one stage."""
    mixed = mixed_plan()
    assert len(mixed.stages) > 1
    assert mixed.gain > 0.1
    assert mixed.cost < mixed.one_stage_cost
    alike = plan(ALIKE, MODEL, CAPACITY, 0.7 * capacity_rate(ALIKE, MODEL, CAPACITY, 16), 16)
    assert len(alike.stages) == 1
    assert alike.cost == alike.one_stage_cost


def test_gain_approaches_the_cauchy_schwarz_bound() -> None:
    """
    With decode work only and many instances, two stages of two lengths reach the optimum of the design's derivation.

    90 % of the tokens at about 200 and 10 % at about 8,000: the mean excess over the base is
    (sqrt(R1 W1) + sqrt(R2 W2))^2 / (E - W) against R W / (E - W), 52 % less.
    """
    model = StepModel(
        base_s=0.01, per_decode_s=0.0, per_kv_token_s=1e-7, per_prefill_token_s=0.0, per_prefill_attention_s=0.0
    )
    roomy = InstanceCapacity(10_000_000, 16, 100_000, 1 << 20)
    workload = LengthHistogram.from_requests([190] * 9 + [7990], [21] * 10)
    n = 256
    steps = np.array([0.9, 0.1]) * 20
    work_s = steps * np.array([200.0, 8000.0]) * model.per_kv_token_s
    rate = 0.5 * n / work_s.sum()
    planned = plan(
        workload, model, roomy, rate, n, objective=WeightedLatency(0.0, 1.0), hand_over=HandOverCost(0.0), max_stages=2
    )
    demand = rate * steps
    work = rate * work_s
    spare = n - work.sum()
    best_excess = np.sqrt(demand * work).sum() ** 2 / spare / demand.sum() * model.base_s
    one_excess = work.sum() / spare * model.base_s
    assert planned.one_stage_cost - model.base_s == pytest.approx(one_excess, rel=0.02)
    assert planned.cost - model.base_s == pytest.approx(best_excess, rel=0.02)
    assert 1.0 - best_excess / one_excess == pytest.approx(0.52, abs=0.01)


def test_margin_decides() -> None:
    """A margin just below the gain keeps the stages, one just above gives one stage; the best layout stays known."""
    gain = mixed_plan().gain
    below = mixed_plan(margin=gain - 0.001)
    above = mixed_plan(margin=gain + 0.001)
    assert len(below.stages) > 1
    assert len(above.stages) == 1
    assert above.best is not None
    assert above.best.proposal.boundaries_tokens == below.boundaries_tokens
    assert above.gain == pytest.approx(gain)


def test_plan_is_consistent() -> None:
    """Shares and instances add up, the cost is the stages', and hand-overs into a stage are those at its boundary."""
    planned = mixed_plan()
    assert sum(planned.instances) == 16
    assert sum(s.share_of_requests for s in planned.stages) == pytest.approx(1.0)
    assert sum(s.share_of_steps for s in planned.stages) == pytest.approx(1.0)
    assert sum(s.share_of_work for s in planned.stages) == pytest.approx(1.0)
    assert sum(s.service.cost for s in planned.stages) == pytest.approx(planned.cost)
    assert planned.stages[0].hand_overs_per_s == 0.0
    for stage in planned.stages[1:]:
        edge = MIXED.edge_index(stage.range.lo_tokens)
        assert stage.hand_overs_per_s == pytest.approx(planned.problem.rate_per_s * MIXED.hand_overs[edge])


def test_same_input_same_plan() -> None:
    """Planning twice gives the same layout and cost."""
    first, second = mixed_plan(), mixed_plan()
    assert (first.boundaries_tokens, first.instances, first.cost) == (
        second.boundaries_tokens,
        second.instances,
        second.cost,
    )


def test_prediction_of_the_planned_layout_is_the_plans() -> None:
    """`predict` of the planned boundaries and instances costs what the plan says; other splits cost more."""
    planned = mixed_plan()
    again = predict(planned.problem, planned.proposal)
    assert again.cost == pytest.approx(planned.cost)
    assert again.one_stage_cost == pytest.approx(planned.one_stage_cost)
    first, second, *rest = planned.instances
    for moved in (1, -1):
        if first + moved >= 1 and second - moved >= 1:
            other = predict(
                planned.problem, Proposal(planned.boundaries_tokens, (first + moved, second - moved, *rest))
            )
            assert other.cost >= planned.cost * (1.0 - 1e-9)


def test_layout_names_instances_in_order() -> None:
    """The plan for given instances is a layout with its boundaries; another number of instances is an error."""
    planned = mixed_plan()
    ids = tuple(f"i{k:02d}" for k in range(16))
    layout = planned.layout(ids)
    assert isinstance(layout, StageLayout)
    assert layout.boundaries_tokens == planned.boundaries_tokens
    assert tuple(len(stage.instance_ids) for stage in layout.stages) == planned.instances
    assert tuple(i for stage in layout.stages for i in stage.instance_ids) == ids
    with pytest.raises(PlanError, match="16 instances, not 3"):
        planned.layout(ids[:3])


@pytest.mark.parametrize("max_stages", [1, 4])
def test_capacity_is_the_edge_of_what_can_be_planned(max_stages: int) -> None:
    """Just below the capacity there is a plan; just above, there is an error that states the capacity."""
    capacity = capacity_rate(MIXED, MODEL, CAPACITY, 8, max_stages=max_stages)
    assert math.isfinite(plan(MIXED, MODEL, CAPACITY, 0.99 * capacity, 8, max_stages=max_stages).cost)
    with pytest.raises(PlanError, match="above the capacity of 8 instances") as caught:
        plan(MIXED, MODEL, CAPACITY, 1.05 * capacity, 8, max_stages=max_stages)
    assert caught.value.capacity_per_s == pytest.approx(capacity, rel=0.02)


def test_capacity_grows_with_instances_and_stages_never_lower_it() -> None:
    """Twice the instances carry twice the rate; allowing stages carries at least as much as one stage."""
    one = capacity_rate(MIXED, MODEL, CAPACITY, 8)
    assert capacity_rate(MIXED, MODEL, CAPACITY, 16) == pytest.approx(2.0 * one, rel=0.05)
    assert capacity_rate(MIXED, MODEL, CAPACITY, 8, max_stages=3) >= one * (1.0 - 1e-6)


def test_capacity_within_a_floor() -> None:
    """A limit on TPOT lowers the capacity; one below the cost of an empty step leaves none."""
    free = capacity_rate(MIXED, MODEL, CAPACITY, 8)
    assert 0.0 < capacity_rate(MIXED, MODEL, CAPACITY, 8, floor=ServiceFloor(tpot_s=0.012)) < free
    assert capacity_rate(MIXED, MODEL, CAPACITY, 8, floor=ServiceFloor(tpot_s=0.006)) == 0.0


def test_one_instance_is_one_stage() -> None:
    """With a single instance there can only be one stage."""
    planned = plan(MIXED, MODEL, CAPACITY, 1.0, 1)
    assert planned.instances == (1,)
    assert planned.best is None
    assert "one stage" in explain(planned)


def test_slo_attainment_follows_its_limits() -> None:
    """Loose limits are met by nearly all requests, impossible ones by none, and tighter ones by fewer."""

    def missed(ttft_s: float, tpot_s: float) -> float:
        return mixed_plan(objective=SloAttainment(ttft_s, tpot_s)).cost

    assert missed(60.0, 1.0) < 0.001
    assert missed(1e-3, 1e-3) > 1.0
    assert missed(60.0, 0.012) < missed(60.0, 0.008) + 1e-9
    assert missed(2.0, 1.0) <= missed(0.05, 1.0)


def test_weighted_latency_of_ttft_alone_is_the_mean_ttft() -> None:
    """With weight on TTFT only, the one-stage value is the predicted mean TTFT."""
    histogram = LengthHistogram.from_requests([500] * 10, [100] * 10)
    problem = PlanProblem(histogram, MODEL, CAPACITY, 20.0, 4, objective=WeightedLatency(1.0, 0.0))
    service = problem.service(0, len(problem.edges) - 1, 4)
    assert service.cost == pytest.approx(service.ttft_s, rel=0.02)


def test_explanation_names_the_decision_and_its_limits() -> None:
    """The explanation has boundaries, gain, margin, a row per stage, costs per stage count, and other rates."""
    planned = mixed_plan()
    text = explain(planned)
    assert f"{len(planned.stages)} stages" in text
    assert f"gain {planned.gain:.1%}" in text
    for stage in planned.stages:
        assert str(stage.range) in text
    assert "margin above" in text
    assert "At 0.8 x the rate" in text
    assert "At 1.2 x the rate" in text
    one = explain(mixed_plan(margin=0.9))
    assert "below the margin of 90.0%" in one
    overloaded = explain(mixed_plan(load=0.95))
    assert "At 1.2 x the rate: not served" in overloaded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rate_per_s": 0.0}, "positive number of requests per second"),
        ({"rate_per_s": math.nan}, "positive number of requests per second"),
        ({"n_instances": 0}, "at least one instance"),
        ({"margin": 1.0}, r"margin lies in \[0, 1\)"),
        ({"stage_tolerance": -0.1}, "stage tolerance"),
        ({"max_stages": 0}, "max_stages"),
        ({"capacity": InstanceCapacity(100, 16, 64, 2048)}, "do not fit into an instance's 1600 tokens"),
        ({"capacity": InstanceCapacity(0, 16, 64, 2048)}, "without capacity"),
    ],
)
def test_bad_problems_are_refused(change: dict, said: str) -> None:
    """Numbers out of range, and requests longer than an instance's memory, are errors that say so."""
    arguments = {
        "histogram": MIXED,
        "step_model": MODEL,
        "capacity": CAPACITY,
        "rate_per_s": 10.0,
        "n_instances": 4,
        "objective": MeanNormalizedLatency(),
    }
    with pytest.raises(PlanError, match=said):
        PlanProblem(**(arguments | change))


def test_bad_parts_are_refused() -> None:
    """Negative pauses, weights and limits, and boundaries that the histogram cannot tell apart, are errors."""
    with pytest.raises(PlanError, match="pause_s"):
        HandOverCost(-1.0)
    with pytest.raises(PlanError, match="weights"):
        WeightedLatency(0.0, 0.0)
    with pytest.raises(PlanError, match="SLO limits"):
        SloAttainment(0.0, 1.0)
    with pytest.raises(PlanError, match="limits must be positive"):
        ServiceFloor(tpot_s=-1.0)
    problem = PlanProblem(MIXED, MODEL, CAPACITY, 10.0, 4)
    with pytest.raises(PlanError, match="closer than the histogram's buckets"):
        predict(problem, Proposal((5000, 5001), (1, 1, 2)))
