"""
Adapts the cascade's layout to the workload and the engines: learns step costs, replans, moves boundaries.

It runs at every report and does at most one of these when it is due. It changes only the roster and migrates no
request: requests that have become too long for their stage are handed over as usual. A planner failure leaves the
layout as it is; it is reported as `Adapted.failure`, and planning is retried one interval later.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cascadeinfer.core.adapt.boundaries import BoundaryRefiner, Neighbours, RefineSettings, outlook
from cascadeinfer.core.adapt.recent import RecentWorkload
from cascadeinfer.core.adapt.replanning import ModelPlanner, Planner, PlanSettings, Replanner
from cascadeinfer.core.adapt.scaling import Advice, ScaleAdvisor
from cascadeinfer.core.adapt.step_models import StepModels
from cascadeinfer.core.adapt.watch import WorkloadWatch
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.effects import AdviseScale, AssignTerms, Effect, PublishLayout
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.kind import InstanceKind, InstanceTerms
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.policy import NextPlan
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import InstanceCapacity, InstanceId
from cascadeinfer.core.view import ClusterView, InstanceView


@dataclass(frozen=True, slots=True)
class Adapted:
    """
    What has changed.

    Attributes:
        layout: Why the roster's desired layout changed; empty when it did not.
        models: Whether the step cost models have changed.
        failure: Why planning failed; empty when it did not.
        advice: How many instances are needed, if that is new.
        terms: Instances that get another role or token budget.
    """

    layout: str = ""
    models: bool = False
    failure: str = ""
    advice: Advice | None = None
    terms: Mapping[InstanceId, InstanceTerms] = field(default_factory=dict)

    def told(self, cause: str, layout: StageLayout) -> list[Effect]:
        """What is said beyond a changed layout: new terms, that planning failed, how many instances are needed."""
        told: list[Effect] = [AssignTerms(cause, instance_id, terms) for instance_id, terms in self.terms.items()]
        if self.failure:
            told.append(PublishLayout(cause, layout, failure=self.failure))
        if self.advice is not None:
            told.append(AdviseScale(cause, self.advice.n_instances, self.advice.why))
        return told


NOTHING = Adapted()


class Adapts(Protocol):
    """
    What changes a policy's stages and step models while it runs.

    Attributes:
        watch: Must be notified of arrivals and ends.
    """

    watch: WorkloadWatch

    def step(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        """Do what is due. See `Adaptation.step`."""
        ...

    def next_plan(self) -> NextPlan | None:
        """See `cascadeinfer.core.policy.PlansAhead`."""
        ...


class Adaptation:
    """
    See the module header.

    Attributes:
        watch: Must be notified of arrivals and ends.
    """

    def __init__(
        self,
        roster: Roster,
        view: ClusterView,
        *,
        models: StepModels,
        planner: Planner | None,
        refine: bool,
        replan: bool,
        refinement: RefineSettings,
        planning: PlanSettings,
    ) -> None:
        """
        Args:
            roster: The layout to change.
            view: The policy's books.
            models: The step cost models in use, which also learn.
            planner: Replaces the planner built from the cost models.
            refine: Whether boundaries move between plans.
            replan: Whether to plan anew.
            refinement: How boundaries move.
            planning: When and how to plan.
        """
        self._models = models
        self._roster = roster
        self._view = view
        self._refines = refine
        self._refinement = refinement
        self._planning = planning
        self._refiners: dict[int, BoundaryRefiner] = {}
        self._next_refine_s = 0.0
        self._recent = RecentWorkload(refinement.memory_s, planning.max_tokens)
        workloads = [self._recent] if refine and models.expected else []
        self._planner = ModelPlanner(None, planning) if planner is None and models.expected else None
        asked = planner or self._planner
        self._replanner = Replanner(asked, planning) if replan and asked is not None else None
        self._advisor = None if planning.service_level is None else ScaleAdvisor(planning.service_level)
        if self._replanner is not None:
            workloads.append(self._replanner.workload)
        self.watch = WorkloadWatch(workloads)

    def step(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        """
        Do what is due.

        Args:
            members: Instances of each stage in force.
            now_s: The current time.
        """
        if self._models.is_due(now_s):
            return Adapted(models=True) if self._models.update(now_s) else NOTHING
        if self._replanner is not None and self._replanner.is_due(now_s):
            return self._plan(self._replanner, members, now_s)
        if self._refines and now_s >= self._next_refine_s:
            self._next_refine_s = now_s + self._refinement.interval_s
            if len(members) > 1:
                return self._refine(members, now_s)
        return NOTHING

    def next_plan(self) -> NextPlan | None:
        """See `cascadeinfer.core.policy.PlansAhead`."""
        if self._replanner is None:
            return None
        return self._replanner.next_plan("" if self._planner is None else self._planner.verdict)

    def _plan(self, replanner: Replanner, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        layout = self._roster.layout
        assert layout is not None
        ranked = [instance.instance_id for stage in members for instance in sorted(stage, key=mean_tokens)]
        try:
            model, capacity = self._models.weakest(kinds_of(member for stage in members for member in stage))
            if self._planner is not None:
                self._planner.model = model
            unfinished = self.watch.unfinished(self._view.requests.values())
            proposed = replanner.propose(layout, capacity, ranked, now_s, unfinished)
        except Exception as error:  # noqa: BLE001 - a fault in planning must not cost the event's other effects
            return Adapted(failure=f"no plan could be made: {error!r}")
        why = ""
        if proposed is not None:
            self._roster.adopt(proposed)
            self._refiners.clear()
            why = "planned" if self._planner is None else self._planner.why
        try:
            advice = self._advise(replanner, model, capacity, len(ranked))
        except Exception as error:  # noqa: BLE001 - the same
            return Adapted(layout=why, failure=f"no number of instances could be advised: {error!r}")
        return Adapted(layout=why, advice=advice)

    def _advise(
        self, replanner: Replanner, model: StepModel | None, capacity: InstanceCapacity, n_instances: int
    ) -> Advice | None:
        """How many instances the workload that the plan was made from needs, if that is known, asked for, and new."""
        if self._advisor is None or replanner.seen is None or model is None:
            return None
        return self._advisor.advise(self._planning.problem(model, *replanner.seen, capacity, n_instances))

    def _refine(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        problems = self._recent_problems(members, now_s)
        loads = [sum(member.load for member in stage) / len(stage) for stage in members]
        moves = []
        for stage, plan_stage in enumerate(self._roster.plan_stage[:-1]):
            boundaries = self._roster.boundaries_tokens
            before = boundaries[plan_stage]
            around = Neighbours(
                below_tokens=boundaries[plan_stage - 1] if plan_stage else 0,
                above_tokens=boundaries[plan_stage + 1] if plan_stage + 1 < len(boundaries) else None,
                lower_load=loads[stage],
                upper_load=loads[stage + 1],
            )
            gain_of = None
            if problems is not None:
                sides = problems[stage], problems[stage + 1]
                gain_of = outlook(sides, before, around, (len(members[stage]), len(members[stage + 1])))
            refiner = self._refiners.setdefault(plan_stage, BoundaryRefiner(self._refinement))
            after = refiner.step(before, around, gain_of)
            if after != before:
                self._roster.move_boundary(plan_stage, after)
                moves.append(f"{before} to {after}")
        return Adapted(layout=f"boundary {', '.join(moves)} tokens") if moves else NOTHING

    def _recent_problems(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> list[PlanProblem] | None:
        """
        The recent workload, per stage, as the planner sees it on the stage's weakest instance.

        None without a cost model of each kind, when too little has been seen, or where the longest requests do not fit
        that instance: boundaries then only balance load.
        """
        try:
            made_with = [self._models.weakest(kinds_of(stage)) for stage in members]
        except PlanError:  # reported when a plan is made
            return None
        if any(model is None for model, _ in made_with):
            return None
        unfinished = self.watch.unfinished(self._view.requests.values())
        seen = self._recent.look(now_s, self._refinement.min_requests, unfinished)
        if seen is None:
            return None
        n = len(self._roster.stage_of)
        try:
            problems = {
                (model, capacity): self._planning.problem(model, *seen, capacity, n)
                for model, capacity in dict.fromkeys(made_with)
                if model is not None
            }
        except PlanError:
            return None
        return [problems[model, capacity] for model, capacity in made_with if model is not None]


def kinds_of(instances: Iterable[InstanceView]) -> list[InstanceKind]:
    """The kind of each."""
    return [instance.kind for instance in instances]


def mean_tokens(instance: InstanceView) -> tuple[float, InstanceId]:
    """Sort key: mean length of the instance's requests, then its id."""
    tokens = instance.kv_tokens + instance.foreign_tokens
    return tokens / max(1, len(instance.request_ids) + instance.foreign_requests), instance.instance_id
