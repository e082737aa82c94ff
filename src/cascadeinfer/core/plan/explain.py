"""
Explains a plan in words: what was chosen and why, the predicted gain, and what would change the decision.

The last part is computed: the problem is solved again at other rates, and the gain there is compared with the margin.
"""

from typing import Final

import numpy as np

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.plan.planner import Plan, StagePrediction, solve
from cascadeinfer.core.plan.problem import PlanProblem

_RATE_CHANGES: Final = (0.8, 1.2)


def explain(plan: Plan) -> str:
    """The plan as text with a table. Solves the problem twice more, at 0.8 and 1.2 times the rate."""
    return "\n".join([*_decision(plan), "", *_table(plan), "", *_reasons(plan), "", *_sensitivity(plan)])


def reasons(plan: Plan) -> list[str]:
    """The same explanation without the table, for callers that draw their own."""
    return [*_decision(plan), "", *_reasons(plan), "", *_sensitivity(plan)]


def _decision(plan: Plan) -> list[str]:
    problem = plan.problem
    describe = problem.objective.describe
    head = (
        f"{problem.n_instances} instances at {problem.rate_per_s:g} requests/s "
        f"(mean prompt {problem.histogram.mean_prompt_tokens:.0f}, "
        f"output {problem.histogram.mean_output_tokens:.0f} tokens):"
    )
    if len(plan.stages) > 1:
        if np.isfinite(plan.one_stage_cost):
            versus = (
                f"one stage would have {describe(plan.one_stage_cost)}, gain {plan.gain:.1%}, margin "
                f"{problem.margin:.1%}"
            )
        else:
            versus = "one stage cannot carry this load"
        return [head, f"{len(plan.stages)} stages, predicted {describe(plan.cost)}; {versus}."]
    if plan.best is None:
        return [head, f"one stage, predicted {describe(plan.cost)}; no layout of several stages can carry this load."]
    best = plan.best
    return [
        head,
        f"one stage, predicted {describe(plan.cost)}.",
        (
            f"The best of several stages (boundaries {_join(best.proposal.boundaries_tokens)}; instances "
            f"{_join(best.proposal.sizes)}) is predicted {describe(best.cost)}: a gain of {plan.gain:.1%}, "
            f"below the margin of {problem.margin:.1%}."
        ),
    ]


def _table(plan: Plan) -> list[str]:
    header = (
        f"{'lengths':>15} {'inst.':>5} {'requests':>8} {'tokens':>7} {'work':>6} {'moved in/s':>10} "
        f"{'batch':>7} {'step ms':>8} {'busy':>5} {'KV':>5} {'TTFT s':>7}"
    )
    return [header, *(_row(stage) for stage in plan.stages)]


def _row(stage: StagePrediction) -> str:
    service = stage.service
    return (
        f"{stage.range!s:>15} {stage.n_instances:>5} {stage.share_of_requests:>8.1%} {stage.share_of_steps:>7.1%} "
        f"{stage.share_of_work:>6.1%} {stage.hand_overs_per_s:>10.2f} {service.batch:>7.1f} "
        f"{1e3 * service.step_s:>8.2f} {service.utilisation:>5.0%} {service.kv_use:>5.0%} {service.ttft_s:>7.3f}"
    )


def _reasons(plan: Plan) -> list[str]:
    problem = plan.problem
    one = problem.service(0, len(problem.edges) - 1, problem.n_instances)
    lines = []
    if len(plan.stages) > 1 and np.isfinite(one.step_s):
        fastest = min(plan.stages, key=lambda stage: stage.service.step_s)
        slowest = max(plan.stages, key=lambda stage: stage.service.step_s)
        lines.append(
            f"Why: in one stage every token waits {1e3 * one.step_s:.2f} ms for its step. Lengths {fastest.range}, "
            f"{fastest.share_of_steps:.0%} of the tokens but {fastest.share_of_work:.0%} of the work, then wait "
            f"{1e3 * fastest.service.step_s:.2f} ms; lengths {slowest.range} {1e3 * slowest.service.step_s:.2f} ms."
        )
    elif len(plan.stages) == 1:
        lines.append(
            "Why: lengths are so alike, or the load so light, that keeping them apart saves less than the instances it "
            "ties down."
            if plan.best is not None
            else "Why: no partition of these instances carries the load."
        )
    costs = ", ".join(
        f"{count}: {problem.objective.describe(cost)}"
        for count, cost in enumerate(plan.cost_by_stages, start=1)
        if np.isfinite(cost)
    )
    return [*lines, f"Best found per number of stages: {costs}."]


def _sensitivity(plan: Plan) -> list[str]:
    rate = plan.problem.rate_per_s
    return [
        f"What would change it: a margin {_margin_flip(plan)}.",
        *(f"At {change:g} x the rate: {_at_rate(plan.problem.with_rate(change * rate))}." for change in _RATE_CHANGES),
    ]


def _margin_flip(plan: Plan) -> str:
    if len(plan.stages) > 1:
        return f"above {plan.gain:.1%} would keep one stage"
    if plan.gain > 0.0:
        return f"of {plan.gain:.1%} or less would choose several stages"
    return "does not matter, as no several stages gain anything"


def _at_rate(problem: PlanProblem) -> str:
    try:
        other = solve(problem)
    except PlanError as error:
        return f"not served ({error})"
    stages = (
        "one stage" if len(other.stages) == 1 else f"{len(other.stages)} stages at {_join(other.boundaries_tokens)}"
    )
    return f"{stages}, gain {other.gain:.1%}, {problem.objective.describe(other.cost)}"


def _join(numbers: tuple[int, ...]) -> str:
    return "/".join(str(number) for number in numbers)
