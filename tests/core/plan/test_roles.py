"""Plans with roles: exact over their candidates, no slower than promised, and what they say is what they do."""

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dynamic_program import compositions, models, objectives, workloads

from cascadeinfer.core.cost.histogram import Column, LengthHistogram
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.qoe import PUSHED, range_service
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageKind
from cascadeinfer.core.plan.explain_roles import explain_roles
from cascadeinfer.core.plan.objective import Objective
from cascadeinfer.core.plan.planner import capacity_rate, plan
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import PushCost
from cascadeinfer.core.plan.role_tables import decode_table, prefill_table, push_cost
from cascadeinfer.core.plan.roles import RoleSearcher, solve_roles
from cascadeinfer.core.types import UNBOUNDED_TOKENS
from support.plan_problems import CAPACITY, MODEL, problem_at

PUSH = PushCost(0.01, 1e-7)


def exhaustive(problem: PlanProblem, budgets: tuple[int, ...], push: PushCost, stages: int, prefill: int) -> float:
    """The lowest cost over every threshold, split, partition and budget, each predicted on its own."""
    searcher = RoleSearcher(problem, budgets, push, max_stages=stages, max_prefill=prefill)
    candidates = searcher.candidates
    plain = [replace(problem, capacity=CAPACITY.with_token_budget(budget)).inputs for budget in budgets]

    def cheapest(tables: list, bounds: tuple[int, ...], units: int, most: int) -> float:
        """The least cost of covering these candidates with at most so many stages."""
        best = np.inf
        for count in range(1, min(most, len(bounds) - 1, units) + 1):
            for inner in combinations(bounds[1:-1], count - 1):
                edges = (bounds[0], *inner, bounds[-1])
                for placed in compositions(units, count):
                    cost = sum(
                        min(range_service(table, candidates[a], candidates[b], float(k)).cost for table in tables)
                        for (a, b), k in zip(pairwise(edges), placed, strict=True)
                    )
                    best = min(best, cost)
        return best

    every = tuple(range(len(candidates)))
    best = cheapest(plain, every, problem.n_instances, stages)
    for threshold in searcher.thresholds():
        edge = int(candidates[threshold])
        decoding = [inputs._replace(table=decode_table(inputs.table, edge)) for inputs in plain]
        if threshold == 0:
            decoding = decoding[-1:]
        computing = [inputs._replace(table=prefill_table(inputs.table)) for inputs in plain]
        paid = push_cost(plain[0].table, edge, push.pause_s, push.pause_per_token_s)
        for k in range(1, problem.n_instances):
            cost = cheapest(computing, every[threshold:], k, prefill)
            cost += cheapest(decoding, every, problem.n_instances - k, stages)
            best = min(best, cost + paid)
    return best


@settings(max_examples=25, deadline=None)
@given(
    workload=workloads,
    model=models,
    objective=objectives,
    n_instances=st.integers(2, 4),
    load=st.sampled_from([0.2, 0.6, 0.9]),
    budgets=st.sampled_from([(256,), (256, 1024)]),
)
def test_the_search_is_exhaustive(
    workload: list[tuple[int, int]],
    model: StepModel,
    objective: Objective,
    n_instances: int,
    load: float,
    budgets: tuple[int, ...],
) -> None:
    """Over all thresholds, splits, partitions and budgets, its best is that of trying everything, and is attained."""
    prompts, outputs = zip(*workload, strict=True)
    histogram = LengthHistogram.from_requests(prompts, outputs, max_tokens=16_384, buckets_per_octave=2)
    rate = load * capacity_rate(histogram, model, CAPACITY, n_instances)
    problem = PlanProblem(histogram, model, CAPACITY, rate, n_instances, objective=objective, boundaries_per_octave=1)
    if len(problem.candidates()) > 5:
        problem = replace(
            problem, histogram=LengthHistogram.from_requests(prompts, outputs, max_tokens=16_384, buckets_per_octave=1)
        )
    if len(problem.candidates()) > 6:
        return  # too many to try
    searcher = RoleSearcher(problem, budgets, PUSH, max_stages=2, max_prefill=2)
    choices = [choice for n in (None, *searcher.thresholds()) for choice in searcher.choices(n)]
    best = min(choices, key=lambda choice: choice.cost)
    expected = exhaustive(problem, budgets, PUSH, 2, 2)
    assert best.cost == pytest.approx(expected, rel=1e-9)
    if np.isfinite(expected):
        assert searcher.plan(best, np.inf).cost == pytest.approx(expected, rel=1e-9)


def test_tables_take_the_prompts_apart() -> None:
    """What decode stages no longer compute is what prefill stages compute; requests enter where they would have."""
    table = problem_at(0.5, 4).inputs.table
    edge = table.shape[1] // 2
    decoding, computing = decode_table(table, edge), prefill_table(table)
    for row in (Column.STARTS, Column.PROMPT, Column.ATTENTION):
        taken = computing[row, -1] - computing[row, edge]
        assert decoding[row, -1] + taken == pytest.approx(table[row, -1])
    assert decoding[PUSHED, -1] + decoding[Column.STARTS, -1] == pytest.approx(1.0)
    assert (decoding[Column.STEPS] == table[Column.STEPS]).all()
    assert not computing[Column.STEPS].any()
    assert (decode_table(table, table.shape[1] - 1) == table).all(), "beyond all prompts nothing changes"
    crossing = decoding[Column.STARTS] + decoding[PUSHED] - decoding[Column.LAST_STEPS]
    assert crossing == pytest.approx(table[Column.STARTS] - table[Column.LAST_STEPS])


def test_without_thresholds_it_is_the_cascade() -> None:
    """With the profile's budget alone, the best plan without prefill stages is as good as the planner's coarse one."""
    problem = problem_at(0.85, 8)
    cascade = plan(problem.histogram, MODEL, CAPACITY, problem.rate_per_s, 8, margin=0.0)
    found = solve_roles(replace(problem, margin=0.9), (4096,))
    assert not found.prefill
    assert all(stage.kind is StageKind.MIXED for stage in found.stages)
    assert found.cost == pytest.approx(cascade.cost, rel=0.03)


def test_prefill_stages_pay_where_prompts_are_much_of_the_work() -> None:
    """Where nothing rides along for free, a heavy load of prompts is taken off those who decode."""
    problem = problem_at(0.85, 16)
    found = solve_roles(problem, (512, 4096))
    assert found.prefill
    assert found.cost < 0.97 * found.without_prefill_cost
    assert found.n_prefill + sum(stage.n_instances for stage in found.stages) == 16
    assert found.prefill[0].range.lo_tokens == found.threshold_tokens
    assert found.prefill[-1].range.hi_tokens == UNBOUNDED_TOKENS
    layout = found.layout(tuple(f"i{n:02d}" for n in range(16)))
    assert layout.threshold_tokens == found.threshold_tokens
    for stage, planned in zip(layout.stages.stages, found.stages, strict=True):
        assert layout.kind_of(stage.range) is planned.kind
    told = "\n".join(explain_roles(found, (512, 4096)))
    assert f"{found.n_prefill} instances for" in told
    assert "At 1.2 x the rate" in told


def test_few_outputs_long_prompts_are_not_split_for_nothing() -> None:
    """Where hardly anything is decoded, prefill stages gain nothing, and none is planned."""
    histogram = LengthHistogram.from_requests([500, 600, 700], [2, 2, 2], max_tokens=32_768)
    assert not solve_roles(problem_at(0.5, 4, histogram), (4096,)).prefill


def test_plain_splitting_is_one_stage_each() -> None:
    """`split` gives one prefill stage for all prompts and one that decodes, at the best ratio."""
    problem = problem_at(0.6, 8)
    found = solve_roles(problem, (4096,), split=True)
    assert [str(stage.range) for stage in (*found.prefill, *found.stages)] == ["0-", "0-"]
    assert found.stages[0].kind is StageKind.DECODE
    searcher = RoleSearcher(problem, (4096,), PushCost(), max_stages=1, max_prefill=1)
    inputs = replace(problem, capacity=CAPACITY).inputs
    last = len(problem.edges) - 1
    costs = {
        k: range_service(inputs._replace(table=prefill_table(inputs.table)), 0, last, float(k)).cost
        + range_service(inputs._replace(table=decode_table(inputs.table, 0)), 0, last, float(8 - k)).cost
        for k in range(1, 8)
    }
    assert found.n_prefill == min(costs, key=lambda k: costs[k])
    assert found.cost == pytest.approx(min(costs.values()) + searcher.push_cost(0))


def test_what_cannot_be_planned_says_so() -> None:
    """One instance cannot be split, and a rate above every plan's capacity is an error with the capacity."""
    with pytest.raises(PlanError, match="at least two instances"):
        solve_roles(problem_at(0.5, 1), (4096,), split=True)
    with pytest.raises(PlanError, match="above the capacity"):
        solve_roles(problem_at(0.5, 4).with_rate(1e6), (4096,))


@pytest.mark.parametrize("n_instances", [16, 128, 1024])
def test_the_number_of_predictions_is_bounded(n_instances: int) -> None:
    """O(thresholds x budgets x candidates^2 x min(n, 128)), whatever the number of requests."""
    problem = replace(problem_at(0.7, n_instances), boundaries_per_octave=1)
    budgets = (512, 1024, 2048, 8192)
    searcher = RoleSearcher(problem, budgets, PUSH, max_stages=8, max_prefill=1)
    thresholds = searcher.thresholds()
    for threshold in thresholds:
        searcher.choices(threshold)
    ranges = len(searcher.candidates) * (len(searcher.candidates) - 1) // 2
    assert len(thresholds) <= len(searcher.candidates)
    assert searcher.predictions <= (len(thresholds) + 1) * len(budgets) * ranges * min(n_instances, 128)


def test_many_instances_are_dealt_out_whole() -> None:
    """Above 128 instances units are fractions: the plan has whole instances, all of them, and stays feasible."""
    found = solve_roles(problem_at(0.8, 300), (512, 4096))
    assert sum(stage.n_instances for stage in (*found.prefill, *found.stages)) == 300
    assert np.isfinite(found.cost)
    small = solve_roles(problem_at(0.8, 100), (512, 4096))
    assert found.cost <= 1.02 * small.cost, "more instances at the same load are not worse"
