"""
Stages: consecutive length ranges, each served by a group of instances.

A `Proposal` says how many instances each range gets, a `StageLayout` says which. Invariants, checked on construction:
the ranges tile `[0, infinity)` in order, every stage has at least one instance, and no instance is in two stages. Both
are values; changing one makes
another.
"""

import enum
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from cascadeinfer.core.errors import PlanError
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, LengthRange


@dataclass(frozen=True, slots=True)
class Stage:
    """
    One stage of the cascade.

    Attributes:
        range: Sequence lengths that belong here.
        instance_ids: The instances that serve it, sorted.

    """

    range: LengthRange
    instance_ids: tuple[InstanceId, ...]

    def __str__(self) -> str:
        """E.g. `0-512: 2 instances`."""
        n = len(self.instance_ids)
        return f"{self.range}: {n} instance{'s' if n > 1 else ''}"


@dataclass(frozen=True, slots=True)
class StageLayout:
    """
    Stages in order of length.

    Raises:
        PlanError: The ranges do not tile `[0, infinity)`, a stage is empty, or an instance is in two stages.

    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Check the invariants of the module header."""
        if not self.stages:
            raise PlanError("a layout needs at least one stage")
        if self.stages[0].range.lo_tokens != 0:
            raise PlanError(f"the first stage must start at 0, not {self.stages[0].range.lo_tokens}")
        for before, after in pairwise(self.stages):
            if before.range.hi_tokens != after.range.lo_tokens:
                kind = "gap" if before.range.hi_tokens < after.range.lo_tokens else "overlap"
                raise PlanError(f"{kind} between stages {before.range} and {after.range}")
        if self.stages[-1].range.hi_tokens < UNBOUNDED_TOKENS:
            raise PlanError(f"the last stage must be unbounded, as in {self.stages[-1].range.lo_tokens}-")
        seen: set[InstanceId] = set()
        for stage in self.stages:
            if not stage.instance_ids:
                raise PlanError(f"stage {stage.range} has no instance")
            for instance_id in stage.instance_ids:
                if instance_id in seen:
                    raise PlanError(f"instance {instance_id} is in two stages")
                seen.add(instance_id)

    @classmethod
    def single(cls, instance_ids: tuple[InstanceId, ...]) -> "StageLayout":
        """One stage with every instance: plain load balancing."""
        return cls((Stage(LengthRange(0), tuple(sorted(instance_ids))),))

    @classmethod
    def from_boundaries(
        cls, boundaries_tokens: tuple[int, ...], groups: tuple[tuple[InstanceId, ...], ...]
    ) -> "StageLayout":
        """Stages cut at `boundaries_tokens` (strictly increasing, one fewer than `groups`)."""
        edges = (0, *boundaries_tokens, UNBOUNDED_TOKENS)
        if len(edges) != len(groups) + 1:
            raise PlanError(f"{len(boundaries_tokens)} boundaries make {len(edges) - 1} stages, not {len(groups)}")
        _check_increasing(boundaries_tokens)
        ranges = [LengthRange(lo, hi) for lo, hi in pairwise(edges)]
        return cls(tuple(Stage(r, tuple(sorted(ids))) for r, ids in zip(ranges, groups, strict=True)))

    @property
    def boundaries_tokens(self) -> tuple[int, ...]:
        """The inner boundaries, one fewer than stages."""
        return tuple(stage.range.lo_tokens for stage in self.stages[1:])

    def __str__(self) -> str:
        """E.g. `0-512: 2 instances, 512-: 1 instance`."""
        return ", ".join(map(str, self.stages))

    def stage_index_of(self, length_tokens: int) -> int:
        """Index of the stage that a sequence of this length belongs to."""
        return bisect_right(self.boundaries_tokens, length_tokens)

    def stage_index_of_instance(self, instance_id: InstanceId) -> int | None:
        """Index of the stage that this instance serves, or None."""
        for index, stage in enumerate(self.stages):
            if instance_id in stage.instance_ids:
                return index
        return None


class StageKind(enum.StrEnum):
    """What a stage computes."""

    MIXED = "mixed"
    """Prompts and output tokens."""
    PREFILL = "prefill"
    """Prompts and the first token; then the request is parked and moves to where it decodes."""
    DECODE = "decode"
    """Output tokens only."""


@dataclass(frozen=True, slots=True)
class RoleLayout:
    """
    Stages with roles: prompts from a threshold on are computed in prefill stages, all else as in a `StageLayout`.

    Attributes:
        stages: The stages in which requests decode; they also compute the prompts below the threshold.
        prefill: The prefill stages, by prompt length; none: every prompt is computed where the request decodes.

    Raises:
        PlanError: The ranges of the prefill stages do not tile what lies above the first one's start, a stage is
            empty, or an instance is in two stages.
    """

    stages: StageLayout
    prefill: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        """Check the invariants."""
        seen = {instance_id for stage in self.stages.stages for instance_id in stage.instance_ids}
        for before, after in pairwise(self.prefill):
            if before.range.hi_tokens != after.range.lo_tokens:
                raise PlanError(f"prefill stages {before.range} and {after.range} do not meet")
        if self.prefill and self.prefill[-1].range.hi_tokens < UNBOUNDED_TOKENS:
            raise PlanError("the last prefill stage must be unbounded")
        for stage in self.prefill:
            if not stage.instance_ids:
                raise PlanError(f"prefill stage {stage.range} has no instance")
            for instance_id in stage.instance_ids:
                if instance_id in seen:
                    raise PlanError(f"instance {instance_id} is in two stages")
                seen.add(instance_id)

    @property
    def threshold_tokens(self) -> int:
        """Prompts of at least this length are computed in prefill stages; beyond all lengths without any."""
        return self.prefill[0].range.lo_tokens if self.prefill else UNBOUNDED_TOKENS

    def kind_of(self, lengths: LengthRange) -> StageKind:
        """Kind of the stage in which requests of these lengths decode."""
        return StageKind.MIXED if lengths.lo_tokens < self.threshold_tokens else StageKind.DECODE


@dataclass(frozen=True, slots=True)
class Proposal:
    """
    Stages by size: what the planner answers. Which instances serve them is for whoever knows the instances to say.

    Attributes:
        boundaries_tokens: Inner boundaries, strictly increasing, one fewer than stages.
        sizes: Instances per stage, shortest lengths first.

    Raises:
        PlanError: The boundaries are not increasing or do not match the number of sizes, or a stage is empty.
    """

    boundaries_tokens: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the invariants of the module header."""
        if len(self.sizes) != len(self.boundaries_tokens) + 1 or min(self.sizes) < 1:
            raise PlanError(f"boundaries {self.boundaries_tokens} and instances {self.sizes} are no stages")
        _check_increasing(self.boundaries_tokens)

    @classmethod
    def like(cls, layout: StageLayout) -> "Proposal":
        """The stages of a layout without its names."""
        return cls(layout.boundaries_tokens, tuple(len(stage.instance_ids) for stage in layout.stages))

    @property
    def n_instances(self) -> int:
        """Instances of all stages."""
        return sum(self.sizes)

    def on(self, instance_ids: Sequence[InstanceId]) -> StageLayout:
        """
        The layout when instances are dealt out in this order, the stage of the shortest lengths first.

        Raises:
            PlanError: Their number is another one, or one is named twice.
        """
        if len(instance_ids) != self.n_instances:
            raise PlanError(f"the plan is for {self.n_instances} instances, not {len(instance_ids)}")
        ends = accumulate(self.sizes)
        groups = tuple(tuple(instance_ids[end - n : end]) for end, n in zip(ends, self.sizes, strict=True))
        return StageLayout.from_boundaries(self.boundaries_tokens, groups)


def _check_increasing(boundaries_tokens: tuple[int, ...]) -> None:
    if any(lo >= hi for lo, hi in pairwise((0, *boundaries_tokens, UNBOUNDED_TOKENS))):
        raise PlanError(f"boundaries {boundaries_tokens} are not strictly increasing")
