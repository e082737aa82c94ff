"""
How the cascade's layout follows the workload and the engines: learn step costs, plan anew, move boundaries.

It is asked at every report and does at most one of these, when it is due. It changes only the roster and moves no
request: requests that have become too long for their stage are handed over as usual. A fault of the planner leaves the
layout as it is; it is reported as `Adapted.failure`, and planning is tried again one interval later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cascadeinfer.core.adapt.boundaries import BoundaryRefiner, Neighbours, RefineSettings, outlook
from cascadeinfer.core.adapt.recent import RecentWorkload
from cascadeinfer.core.adapt.replanning import ModelPlanner, Planner, PlanSettings, Replanner
from cascadeinfer.core.adapt.watch import WorkloadWatch
from cascadeinfer.core.cost.latency import StepModel
from cascadeinfer.core.cost.learning import StepLearner
from cascadeinfer.core.cost.samples import StepSample
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import InstanceId
from cascadeinfer.core.view import ClusterView, InstanceView


@dataclass(frozen=True, slots=True)
class Adapted:
    """
    What has changed.

    Attributes:
        layout: Why the roster's desired layout changed; empty when it did not.
        model: The cost model from now on; None when it has not changed.
        failure: Why planning failed; empty when it did not.
    """

    layout: str = ""
    model: StepModel | None = None
    failure: str = ""


NOTHING = Adapted()


class Adaptation:
    """
    See the module header.

    Attributes:
        watch: Must be notified of arrivals and ends.
        model: The step cost model in use; None while nothing is known.
    """

    def __init__(
        self,
        roster: Roster,
        view: ClusterView,
        *,
        model: StepModel | None,
        planner: Planner | None,
        learner: StepLearner | None,
        refine: bool,
        replan: bool,
        refinement: RefineSettings,
        planning: PlanSettings,
    ) -> None:
        """
        Args:
            roster: The layout to change.
            view: The policy's books.
            model: Step cost model to start with.
            planner: Replaces the planner built from the cost model.
            learner: Learns step times; its model takes precedence.
            refine: Whether boundaries move between plans.
            replan: Whether to plan anew.
            refinement: How boundaries move.
            planning: When and how to plan.
        """
        self.model = model
        self._roster = roster
        self._view = view
        self._learner = learner
        self._refines = refine
        self._refinement = refinement
        self._planning = planning
        self._refiners: dict[int, BoundaryRefiner] = {}
        self._next_refine_s = 0.0
        self._recent = RecentWorkload(refinement.memory_s, planning.max_tokens)
        has_model = model is not None or learner is not None
        workloads = [self._recent] if refine and has_model else []
        self._planner = ModelPlanner(model, planning) if planner is None and has_model else None
        asked = planner or self._planner
        self._replanner = Replanner(asked, planning) if replan and asked is not None else None
        if self._replanner is not None:
            workloads.append(self._replanner.workload)
        self.watch = WorkloadWatch(workloads)

    def observe(self, steps: Sequence[StepSample]) -> None:
        """Steps that an instance has reported."""
        if steps and self._learner is not None:
            self._learner.observe(steps)

    def step(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        """
        Do what is due.

        Args:
            members: Instances of each stage in force.
            now_s: The current time.
        """
        if self._learner is not None and self._learner.is_due(now_s):
            if not self._learner.update(now_s):
                return NOTHING
            self.model = self._learner.model
            if self._planner is not None:
                self._planner.model = self.model
            return Adapted(model=self.model)
        if self._replanner is not None and self._replanner.is_due(now_s):
            return self._plan(self._replanner, members, now_s)
        if self._refines and now_s >= self._next_refine_s:
            self._next_refine_s = now_s + self._refinement.interval_s
            if len(members) > 1:
                return self._refine(members, now_s)
        return NOTHING

    def _plan(self, replanner: Replanner, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        layout = self._roster.layout
        assert layout is not None
        ranked = [instance.instance_id for stage in members for instance in sorted(stage, key=_mean_tokens)]
        capacity = members[0][0].capacity
        try:
            unfinished = self.watch.unfinished(self._view.requests.values())
            proposed = replanner.propose(layout, capacity, ranked, now_s, unfinished)
        except Exception as error:  # noqa: BLE001 - a fault in planning must not cost the event's other effects
            return Adapted(failure=f"no plan could be made: {error!r}")
        if proposed is None:
            return NOTHING
        self._roster.adopt(proposed)
        self._refiners.clear()
        return Adapted(layout="planned" if self._planner is None else self._planner.why)

    def _refine(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> Adapted:
        problem = self._recent_problem(members, now_s)
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
            if problem is not None:
                gain_of = outlook(problem, before, around, (len(members[stage]), len(members[stage + 1])))
            refiner = self._refiners.setdefault(plan_stage, BoundaryRefiner(self._refinement))
            after = refiner.step(before, around, gain_of)
            if after != before:
                self._roster.move_boundary(plan_stage, after)
                moves.append(f"{before} to {after}")
        return Adapted(layout=f"boundary {', '.join(moves)} tokens") if moves else NOTHING

    def _recent_problem(self, members: Sequence[Sequence[InstanceView]], now_s: float) -> PlanProblem | None:
        """The recent workload as the planner sees it; None without a cost model or when too little has been seen."""
        if self.model is None:
            return None
        unfinished = self.watch.unfinished(self._view.requests.values())
        seen = self._recent.look(now_s, self._refinement.min_requests, unfinished)
        if seen is None:
            return None
        return self._planning.problem(self.model, *seen, members[0][0].capacity, len(self._roster.stage_of))


def _mean_tokens(instance: InstanceView) -> tuple[float, InstanceId]:
    """Sort key: mean length of the instance's requests, then its id."""
    tokens = instance.kv_tokens + instance.foreign_tokens
    return tokens / max(1, len(instance.request_ids) + instance.foreign_requests), instance.instance_id
