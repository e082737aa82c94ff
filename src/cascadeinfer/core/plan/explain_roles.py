"""Explains a plan with roles in words: what each stage does and why, what prefill stages gain, what would change it."""

from typing import Final

import numpy as np

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import StageKind
from cascadeinfer.core.plan.role_plan import RolePlan, RoleStage
from cascadeinfer.core.plan.roles import solve_roles

_RATE_CHANGES: Final = (0.8, 1.2)


def explain_roles(plan: RolePlan, budgets: tuple[int, ...]) -> list[str]:
    """
    The plan as lines of text with a table. Solves the problem twice more, at 0.8 and 1.2 times the rate.

    Args:
        plan: The plan.
        budgets: The chunk budgets that it was chosen from.
    """
    return [
        *_decision(plan),
        "",
        *_table(plan),
        "",
        *_reasons(plan),
        "",
        *(_at_rate(plan, change, budgets) for change in _RATE_CHANGES),
    ]


def _decision(plan: RolePlan) -> list[str]:
    problem = plan.problem
    describe = problem.objective.describe
    head = (
        f"{problem.n_instances} instances at {problem.rate_per_s:g} requests/s "
        f"(mean prompt {problem.histogram.mean_prompt_tokens:.0f}, output "
        f"{problem.histogram.mean_output_tokens:.0f} tokens):"
    )
    if not plan.prefill:
        return [head, f"{_shape(plan)}, predicted {describe(plan.cost)}."]
    if not np.isfinite(plan.without_prefill_cost):
        versus = "without prefill stages no plan carries this load"
    else:
        gain = problem.objective.gain(plan.without_prefill_cost, plan.cost)
        versus = f"the best plan without prefill stages has {describe(plan.without_prefill_cost)}, gain {gain:.1%}"
    return [head, f"{_shape(plan)}, predicted {describe(plan.cost)}; {versus}."]


def _shape(plan: RolePlan) -> str:
    """The plan in half a sentence."""
    rest = f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''} that decode"
    if not plan.prefill:
        return f"no prefill stages, {rest} what they compute"
    whose = "all prompts" if plan.threshold_tokens == 0 else f"prompts of {plan.threshold_tokens} tokens and more"
    return f"{plan.n_prefill} instances for {whose}, {rest}"


def _table(plan: RolePlan) -> list[str]:
    header = (
        f"{'kind':>8} {'lengths':>15} {'inst.':>5} {'chunks':>6} {'batch':>7} {'step ms':>8} {'prompts':>7} {'KV':>5} "
        f"{'TTFT s':>7}"
    )
    return [header, *(_row(stage) for stage in (*plan.prefill, *plan.stages))]


def _row(stage: RoleStage) -> str:
    service = stage.service
    computes = stage.kind is not StageKind.DECODE
    ttft = f"{service.ttft_s:.3f}" if computes else "-"
    chunks = str(stage.budget_tokens) if computes else "-"
    return (
        f"{stage.kind.value:>8} {stage.range!s:>15} {stage.n_instances:>5} {chunks:>6} {service.batch:>7.1f} "
        f"{1e3 * service.step_s:>8.2f} {service.prefill_utilisation:>7.0%} {service.kv_use:>5.0%} {ttft:>7}"
    )


def _reasons(plan: RolePlan) -> list[str]:
    describe = plan.problem.objective.describe
    if plan.prefill:
        fastest = min((s for s in plan.stages if s.service.batch > 0.0), key=lambda s: s.service.step_s, default=None)
        told = "" if fastest is None else f": lengths {fastest.range} decode in {1e3 * fastest.service.step_s:.2f} ms"
        why = f"Why: prompts on instances of their own do not lengthen the steps of those who decode{told}."
        return [f"{why} Moving each of these requests once costs {describe(plan.push_cost)} in the mean."]
    return [
        "Why: what decoding gains from instances for prompts is less than what these instances and the moves cost.",
    ]


def _at_rate(plan: RolePlan, change: float, budgets: tuple[int, ...]) -> str:
    problem = plan.problem.with_rate(change * plan.problem.rate_per_s)
    try:
        other = solve_roles(problem, budgets)
    except PlanError as error:
        return f"At {change:g} x the rate: not served ({error})."
    return f"At {change:g} x the rate: {_shape(other)}, {problem.objective.describe(other.cost)}."
