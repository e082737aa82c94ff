"""
Which instances serve which stage: the wanted layout, and the layout in force with the instances that are present.

A plan names boundaries and groups. Instances come and go; the layout in force follows from the plan and the instances
present:
- A stage without instances is absorbed by the next longer one that has any (short requests in a long stage slow only
  themselves), the longest stage by the one below. It returns with the first of its instances.
- An instance that the plan does not name joins the stage of the one that it replaces, else the stage that lacks most
  instances, the longest among equals; without a plan there is one stage.
Boundaries move by refinement and by new plans. The layout in force is public: every agent may read it.
"""

from collections.abc import Sequence

from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.types import InstanceId


class Roster:
    """
    The wanted stages, and the layout in force.

    Attributes:
        layout: The layout in force; None while no instance is present.
        stage_of: Index of each instance's stage in it.
        plan_stage: Per stage in force, its index in the plan.
    """

    def __init__(self, plan: StageLayout | None = None) -> None:
        """
        Args:
            plan: The layout wanted from the start; its instances may arrive later. None: one stage of all that arrive.
        """
        self.layout: StageLayout | None = None
        self.stage_of: dict[InstanceId, int] = {}
        self.plan_stage: tuple[int, ...] = ()
        self._boundaries: list[int] = []
        self._sizes: list[int] = [0]
        self._member_of: dict[InstanceId, int] = {}
        if plan is not None:
            self.adopt(plan)

    @property
    def boundaries_tokens(self) -> tuple[int, ...]:
        """The plan's boundaries, as refined."""
        return tuple(self._boundaries)

    def adopt(self, plan: StageLayout) -> None:
        """Want this layout from now on; `follow` brings it into force."""
        self._boundaries = list(plan.boundaries_tokens)
        self._sizes = [len(stage.instance_ids) for stage in plan.stages]
        self._member_of = {i: index for index, stage in enumerate(plan.stages) for i in stage.instance_ids}

    def succeed(self, instance_id: InstanceId, replaced_id: InstanceId | None) -> None:
        """An instance that the plan does not name takes over the stage of another, if any; `follow` brings it there."""
        if replaced_id in self._member_of:
            self._member_of.setdefault(instance_id, self._member_of[replaced_id])

    def move_boundary(self, index: int, boundary_tokens: int) -> None:
        """Move the plan's boundary between its stages `index` and `index + 1`; it must stay between its neighbours."""
        low = self._boundaries[index - 1] if index else 0
        high = self._boundaries[index + 1] if index + 1 < len(self._boundaries) else boundary_tokens + 1
        assert low < boundary_tokens < high, f"boundary {boundary_tokens} is not between {low} and {high}"
        self._boundaries[index] = boundary_tokens

    def follow(self, there: Sequence[InstanceId]) -> bool:
        """
        Recompute the layout in force.

        Args:
            there: Instances that take requests, sorted.

        Returns:
            Whether it has changed.
        """
        members = self._groups(there)
        used = [index for index, group in enumerate(members) if group]
        before = self.layout
        if not used:
            self.layout, self.stage_of, self.plan_stage = None, {}, ()
            return before is not None
        boundaries = tuple(self._boundaries[index] for index in used[:-1])
        self.layout = StageLayout.from_boundaries(boundaries, tuple(tuple(members[index]) for index in used))
        self.stage_of = {i: index for index, stage in enumerate(self.layout.stages) for i in stage.instance_ids}
        self.plan_stage = tuple(used)
        return self.layout != before

    def _groups(self, there: Sequence[InstanceId]) -> list[list[InstanceId]]:
        members: list[list[InstanceId]] = [[] for _ in self._sizes]
        for instance_id in there:
            if (index := self._member_of.get(instance_id)) is not None:
                members[index].append(instance_id)
        for instance_id in there:
            if instance_id not in self._member_of:
                lacks = [size - len(group) for size, group in zip(self._sizes, members, strict=True)]
                index = max(range(len(lacks)), key=lambda i: (lacks[i], i))
                members[index].append(instance_id)
                self._member_of[instance_id] = index
        return members
