"""A plan with roles as a value: its stages with their predictions, and the instances dealt out to them."""

from dataclasses import dataclass

from cascadeinfer.core.cost.qoe import StageService
from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.layout import RoleLayout, Stage, StageKind, StageLayout
from cascadeinfer.core.plan.problem import PlanProblem
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, LengthRange


@dataclass(frozen=True, slots=True)
class PushCost:
    """
    The pause of a request between its first token, on a prefill instance, and its second one.

    Attributes:
        pause_s: Besides the transfer: asking for room, starting the pull, waiting for the step in flight.
        pause_per_token_s: Per token of its prompt.
    """

    pause_s: float = 0.015
    pause_per_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleStage:
    """
    One stage of a plan with roles.

    Attributes:
        kind: What it computes.
        range: Lengths of prompts for a prefill stage, of sequences otherwise.
        n_instances: Number of instances.
        budget_tokens: Tokens of a step.
        service: The model's prediction.
    """

    kind: StageKind
    range: LengthRange
    n_instances: int
    budget_tokens: int
    service: StageService


@dataclass(frozen=True, slots=True, eq=False)
class RolePlan:
    """
    Proposed stages with roles and their predictions.

    Attributes:
        prefill: Prefill stages by prompt length.
        stages: All other stages by length.
        cost: Predicted objective.
        without_prefill_cost: That of the best plan without prefill stages; infinite when there is none.
        push_cost: Its part that pushes cost.
        problem: The problem that was solved.
    """

    prefill: tuple[RoleStage, ...]
    stages: tuple[RoleStage, ...]
    cost: float
    without_prefill_cost: float
    push_cost: float
    problem: PlanProblem

    @property
    def threshold_tokens(self) -> int:
        """Prompts of at least this length are computed in prefill stages; beyond all lengths without any."""
        return self.prefill[0].range.lo_tokens if self.prefill else UNBOUNDED_TOKENS

    @property
    def n_prefill(self) -> int:
        """Instances of prefill stages."""
        return sum(stage.n_instances for stage in self.prefill)

    @property
    def every(self) -> tuple[RoleStage, ...]:
        """All stages, prefill stages first."""
        return (*self.prefill, *self.stages)

    def layout(self, instance_ids: tuple[InstanceId, ...]) -> RoleLayout:
        """The plan applied to these instances in order of id, prefill stages first."""
        prefill = [
            Stage(stage.range, ids) for stage, ids in self.dealt(instance_ids) if stage.kind is StageKind.PREFILL
        ]
        rest = [
            Stage(stage.range, ids) for stage, ids in self.dealt(instance_ids) if stage.kind is not StageKind.PREFILL
        ]
        return RoleLayout(StageLayout(tuple(rest)), tuple(prefill))

    def dealt(self, instance_ids: tuple[InstanceId, ...]) -> list[tuple[RoleStage, tuple[InstanceId, ...]]]:
        """
        Each stage with its instances.

        Raises:
            PlanError: Their number is not the plan's.
        """
        if len(instance_ids) != sum(stage.n_instances for stage in self.every):
            raise PlanError(f"the plan is not for {len(instance_ids)} instances")
        left = sorted(instance_ids)
        found = []
        for stage in self.every:
            found.append((stage, tuple(left[: stage.n_instances])))
            del left[: stage.n_instances]
        return found
