"""Predicts given stages with roles, as the search for a plan predicts its own: the yardstick for a new plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cascadeinfer.core.cost.qoe import StageService, range_service
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import PushCost
from cascadeinfer.core.plan.role_tables import decode_table, prefill_table, push_cost
from cascadeinfer.core.types import UNBOUNDED_TOKENS, LengthRange


class StageInForce(NamedTuple):
    """
    One stage as it is.

    Attributes:
        range: Lengths of prompts for a prefill stage, of sequences otherwise.
        n_instances: Number of instances.
        budget_tokens: Tokens of a step.
    """

    range: LengthRange
    n_instances: int
    budget_tokens: int


def predict_roles(
    problem: PlanProblem, prefill: Sequence[StageInForce], stages: Sequence[StageInForce], push: PushCost
) -> float:
    """
    The objective of these stages.

    Args:
        problem: Workload, rate and objective; its token budget is not used.
        prefill: Prefill stages by prompt length.
        stages: Stages in which requests decode, by length.
        push: Cost of a push.

    Returns:
        The predicted objective; infinite when the stages cannot carry the load, when one has no instance, or when two
        boundaries are in one bucket of the workload's lengths.
    """
    histogram = problem.histogram
    last = len(histogram.edges_tokens) - 1
    threshold = histogram.nearest_edge(prefill[0].range.lo_tokens) if prefill else last
    plain = problem.inputs.table
    cost = push_cost(plain, threshold, push.pause_s, push.pause_per_token_s) if prefill else 0.0
    for stage, is_prefill in [*((stage, True) for stage in prefill), *((stage, False) for stage in stages)]:
        inputs = replace(problem, capacity=problem.capacity.with_token_budget(stage.budget_tokens)).inputs
        table = prefill_table(inputs.table) if is_prefill else decode_table(inputs.table, threshold)
        low = histogram.nearest_edge(stage.range.lo_tokens)
        unbounded = stage.range.hi_tokens >= UNBOUNDED_TOKENS
        high = last if unbounded else histogram.nearest_edge(stage.range.hi_tokens)
        if low >= high or stage.n_instances < 1:
            return float(np.inf)
        predicted: StageService = range_service(inputs._replace(table=table), low, high, float(stage.n_instances))
        cost += predicted.cost
    return float(cost)
