"""
Plans stages with roles anew while they are in force: which instances compute prompts, ranges, threshold, token budgets.

Like the cascade's (`adaptation.py`), it runs at every report, learns step costs, plans when a plan is due, and changes
only what is wanted: the roster, the prefill stages, and the terms (role and token budget) of instances. It moves no
request. An instance that becomes a prefill instance is no longer in a stage, so its agent offers what decodes there to
the others; what is parked on one that decodes from now on is pushed elsewhere. Ranges are not refined between plans,
because refinement knows no prefill stages.

*When.* A plan must gain as much over what is in force as the cascade's, by the same prediction for the same workload
(`PlanSettings.needed_gain`): as the part in force is priced by the same model, roles do not go back and forth. A demand
above the capacity of every plan is planned for as the cascade does.

*Who.* Prefill instances stay what they are as long as the plan has as many. Further ones are those with the least KV
cache to move away, and those with the least to do are the first to decode again. Decode instances are dealt out in
order of the lengths that they hold, the shortest first.

While more than `PINNED_MOST` of the requests may not move, no plan has prefill stages: they could not be pushed. While
instances differ in more than their terms, e.g. because an operator started some for a role, all stay what they are.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from cascadeinfer.core.adapt.adaptation import NOTHING, Adapted, kinds_of, mean_tokens
from cascadeinfer.core.adapt.replanning import PlanSchedule, PlanSettings
from cascadeinfer.core.adapt.step_models import StepModels
from cascadeinfer.core.adapt.watch import WorkloadWatch
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.kind import NO_TERMS, InstanceKind, InstanceTerms, Role
from cascadeinfer.core.layout import RoleLayout, Stage, StageKind, StageLayout
from cascadeinfer.core.placing.pushing import PrefillStages
from cascadeinfer.core.plan.objective import BalancedLatency
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.plan.role_plan import PushCost, RolePlan
from cascadeinfer.core.plan.role_prediction import StageInForce, predict_roles
from cascadeinfer.core.plan.roles import DEFAULT_BUDGETS, solve_roles
from cascadeinfer.core.policy import NextPlan
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import ClusterView, InstanceView

PINNED_MOST: Final = 0.1
UNITS: Final = 16
"""Units that a plan made while serving places at most: the server waits for the search (docs/planning.md has times)."""


class RoleAdaptation:
    """
    See the module header, and `Adapts`.

    Attributes:
        watch: Must be notified of arrivals and ends.
    """

    def __init__(
        self,
        roster: Roster,
        view: ClusterView,
        prefill: PrefillStages,
        *,
        models: StepModels,
        planning: PlanSettings,
        replan: bool = True,
    ) -> None:
        """
        Args:
            roster: The stages that decode.
            view: The policy's books.
            prefill: The prefill stages.
            models: The step cost models in use, which also learn.
            planning: When and how to plan.
            replan: Whether to plan at all; without it, only step costs are learned.
        """
        self._roster = roster
        self._view = view
        self._prefill = prefill
        self._models = models
        self._planning = planning
        self._schedule = PlanSchedule(planning) if replan and models.expected else None
        self._verdict = ""
        self.watch = WorkloadWatch([] if self._schedule is None else [self._schedule.workload])

    def step(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        """
        Do what is due.

        Args:
            members: Instances of each stage in force that decodes.
            now_s: The current time.
        """
        if self._models.is_due(now_s):
            return Adapted(models=True) if self._models.update(now_s) else NOTHING
        if self._schedule is None or not self._schedule.is_due(now_s):
            return NOTHING
        try:
            return self._plan(self._schedule, members, now_s)
        except Exception as error:  # noqa: BLE001 - a fault in planning must not cost the event's other effects
            return Adapted(failure=f"no plan could be made: {error!r}")

    def next_plan(self) -> NextPlan | None:
        """See `cascadeinfer.core.policy.PlansAhead`."""
        return None if self._schedule is None else self._schedule.next_plan(self._verdict)

    def _plan(self, schedule: PlanSchedule, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        seen = schedule.look(now_s, self.watch.unfinished(self._view.requests.values()))
        if seen is None:
            return NOTHING
        prefill = self._prefill.members()
        every = [instance for stage in [*prefill, *members] for instance in stage]
        if len({_started_as(instance.kind) for instance in every}) > 1:
            self._verdict = "instances are of several kinds, and keep their roles"
            return NOTHING
        model, capacity = self._models.weakest(kinds_of(every))
        if model is None:
            self._verdict = "the cost of steps is not known yet"
            return NOTHING
        workload, rate_per_s = seen
        most = min(instance.kind.most_tokens for instance in every)
        most_of_each = capacity.with_token_budget(most)
        problem = self._planning.problem(
            model, workload, rate_per_s, most_of_each, len(every), objective=BalancedLatency()
        )
        budgets = tuple(
            sorted({most, *(budget for budget in DEFAULT_BUDGETS if capacity.max_num_seqs <= budget <= most)})
        )
        solved = self._solve(problem, budgets)
        if solved is None:
            self._verdict = "no plan can serve this workload"
            return NOTHING
        problem, best = solved
        in_force = self._cost_in_force(problem, prefill, members)
        gain = problem.objective.gain(in_force, best.cost)
        needed = self._planning.needed_gain(workload.requests)
        if gain < needed:
            self._verdict = f"the best other plan would gain {gain:.1%}, less than the {needed:.1%} needed"
            return NOTHING
        self._verdict = "a new plan was put in force"
        terms = self._adopt(best, prefill, members)
        why = (
            f"planned from {workload.requests:.0f} requests at {rate_per_s:.3g}/s: predicted gain over the stages "
            f"before {gain:.0%}"
        )
        return Adapted(layout=why, terms=terms)

    def _solve(self, problem: PlanProblem, budgets: tuple[int, ...]) -> tuple[PlanProblem, RolePlan] | None:
        """The best plan, and the problem that it solves: at the demand, or at a share of what can be served."""
        may_push = self._may_push()
        try:
            return problem, solve_roles(problem, budgets, may_push=may_push, max_units=UNITS)
        except PlanError as error:
            if not error.capacity_per_s:
                return None
            problem = problem.with_rate(self._planning.overload_share * error.capacity_per_s)
        try:
            return problem, solve_roles(problem, budgets, may_push=may_push, max_units=UNITS)
        except PlanError:
            return None

    def _may_push(self) -> bool:
        requests = self._view.requests
        pinned = sum(request.pin_reason is not None for request in requests.values())
        return pinned <= PINNED_MOST * len(requests)

    def _cost_in_force(
        self,
        problem: PlanProblem,
        prefill: Sequence[Sequence[InstanceView]],
        members: Sequence[Sequence[InstanceView]],
    ) -> float:
        layout = self._roster.layout
        assert layout is not None  # instances have reported
        push = PushCost(pause_per_token_s=problem.hand_over.pause_per_token_s)
        return predict_roles(problem, _in_force(self._prefill.stages, prefill), _in_force(layout.stages, members), push)

    def _adopt(
        self, plan: RolePlan, prefill: Sequence[Sequence[InstanceView]], members: Sequence[Sequence[InstanceView]]
    ) -> dict[InstanceId, InstanceTerms]:
        """Want this plan; returns the new terms of instances whose terms change."""
        dealt = deal(plan, [i for stage in prefill for i in stage], members)
        layout = RoleLayout(StageLayout(_stages(plan, dealt, prefill=False)), _stages(plan, dealt, prefill=True))
        self._prefill.adopt(layout.prefill)
        self._roster.adopt(layout.stages)
        terms = {}
        for stage, instances in zip(plan.every, dealt, strict=True):
            wanted = InstanceTerms(Role(stage.kind.value), stage.budget_tokens)
            for instance in instances:
                if instance.kind != instance.kind.with_terms(wanted):
                    terms[instance.instance_id] = wanted
        return terms


def deal(
    plan: RolePlan, prefill: Sequence[InstanceView], members: Sequence[Sequence[InstanceView]]
) -> list[list[InstanceView]]:
    """
    The instances of each stage of a plan, prefill stages first. See the module header, *Who*.

    Args:
        plan: For as many instances as there are.
        prefill: The instances that compute prompts now, by prompt length.
        members: The instances of each stage that decodes, by length.
    """
    busiest = sorted(prefill, key=lambda instance: (-instance.committed_kv_tokens, instance.instance_id))
    kept = {instance.instance_id for instance in busiest[: plan.n_prefill]}
    computing = [instance for instance in prefill if instance.instance_id in kept]
    freed = [instance for instance in prefill if instance.instance_id not in kept]
    ranked = freed + [instance for stage in members for instance in sorted(stage, key=mean_tokens)]
    while len(computing) < plan.n_prefill:
        computing.append(min(ranked, key=lambda instance: (instance.committed_kv_tokens, instance.instance_id)))
        ranked.remove(computing[-1])
    every = computing + ranked
    ends = list(accumulate(stage.n_instances for stage in plan.every))
    return [every[end - stage.n_instances : end] for stage, end in zip(plan.every, ends, strict=True)]


def _started_as(kind: InstanceKind) -> InstanceKind:
    """The kind without its terms."""
    return kind.with_terms(NO_TERMS)


def _in_force(stages: Sequence[Stage], members: Sequence[Sequence[InstanceView]]) -> list[StageInForce]:
    """Stages with what is there; one whose instances are all gone is served by none and costs without end."""
    found = []
    for stage, instances in zip(stages, members, strict=True):
        budget = min((instance.capacity.max_batched_tokens for instance in instances), default=1)
        found.append(StageInForce(stage.range, len(instances), budget))
    return found


def _stages(plan: RolePlan, dealt: Sequence[Sequence[InstanceView]], *, prefill: bool) -> tuple[Stage, ...]:
    return tuple(
        Stage(stage.range, tuple(sorted(instance.instance_id for instance in instances)))
        for stage, instances in zip(plan.every, dealt, strict=True)
        if (stage.kind is StageKind.PREFILL) is prefill
    )
