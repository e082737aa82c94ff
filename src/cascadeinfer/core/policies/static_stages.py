"""
Length stages from the configuration: the simplest form of the cascade.

Dispatch: to the stage of the prompt length, and there to the least loaded instance. Hand-over: a request whose length
has left its stage's range moves to the stage of its length as soon as an instance there has room. Until then it decodes
where it is and is tried again after `retry_s`. At most `max_migrations` per instance run at once, counting both
directions (paper: 3).

Inputs read: reports (lengths, load) and the layout. Edge cases: `core/roster.py` decides, as for the cascade, who
serves a stage whose instances are all gone or draining, and which stage takes an instance that the configuration does
not name. A request with fewer than `min_remaining_tokens` to go is not worth a move; a pinned request stays. Source:
arXiv 2512.19179, with fixed ranges.
"""

from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.effects import Effect, MigrationReason, PublishLayout, StartMigration
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    InstanceReported,
    LayoutAnnounced,
    MigrationEnded,
    MigrationOutcome,
    RequestFinished,
)
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.placing.dispatch import Chosen, has_room, least_loaded, pick
from cascadeinfer.core.placing.evacuation import MAX_MIGRATIONS_PER_INSTANCE
from cascadeinfer.core.policies.info import PolicyInfo, layout_option
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.core.view import InstanceView, RequestView


class StaticStages(PlacingPolicy):
    """Fixed length ranges with live hand-over."""

    evacuates = False

    def __init__(
        self,
        *,
        layout: StageLayout,
        max_migrations: int = MAX_MIGRATIONS_PER_INSTANCE,
        retry_s: float = 0.5,
        min_remaining_tokens: int = 8,
    ) -> None:
        """
        Args:
            layout: The stages; their instances need not be up yet.
            max_migrations: Maximum migrations per instance, both directions together.
            retry_s: Seconds until a request whose move failed or found no room is tried again.
            min_remaining_tokens: A request with fewer tokens left to generate stays.
        """
        super().__init__()
        self._roster = Roster(layout)
        self._max_migrations = max_migrations
        self._retry_s = retry_s
        self._min_remaining_tokens = min_remaining_tokens
        self._not_before_s: dict[RequestId, float] = {}
        self._migrations_started = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects: list[Effect] = []
        if isinstance(event, InstanceJoined | InstanceDraining | InstanceLost):
            effects += self._follow_roster(event)
        elif isinstance(event, LayoutAnnounced):
            self._roster.adopt(event.layout)
            effects += self._in_force(event.cause, [instance.instance_id for instance in self.view.members()])
        effects += super().handle(event, now_s)
        if isinstance(event, MigrationEnded) and event.outcome is MigrationOutcome.STAYED:
            self._not_before_s[event.request_id] = now_s + self._retry_s
        if isinstance(event, RequestFinished):
            self._not_before_s.pop(event.request_id, None)
        if isinstance(event, InstanceReported | InstanceDraining):
            effects += self._hand_over(event.instance_id, event.cause, now_s)
        return effects

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:
        """The least loaded instance of the request's stage, or of the nearest stage if all of its own are suspect."""
        wanted = self._stage_of(request)
        stages = {self._roster.stage_of[c.instance_id] for c in candidates}
        nearest = min(stages, key=lambda stage: (abs(stage - wanted), -stage))
        chosen = pick(self._in_stage(nearest, candidates), request.tokens)
        assert chosen is not None  # the stage has an instance that takes requests
        return chosen

    def _follow_roster(self, event: InstanceJoined | InstanceDraining | InstanceLost) -> list[Effect]:
        """Put the stages into force with the instances that accept requests from now on."""
        there = {instance.instance_id for instance in self.view.members()} - {event.instance_id}
        if isinstance(event, InstanceJoined):
            there.add(event.instance_id)
            self._roster.succeed(event.instance_id, event.replaces)
        return self._in_force(event.cause, sorted(there))

    def _in_force(self, cause: str, there: list[InstanceId]) -> list[Effect]:
        changed = self._roster.follow(there)
        layout = self._roster.layout
        return [PublishLayout(cause, layout)] if changed and layout is not None else []

    def _stage_of(self, request: RequestView) -> int:
        assert self._roster.layout is not None  # some instance accepts requests
        return self._roster.layout.stage_index_of(request.tokens)

    def _in_stage(self, stage: int, candidates: Sequence[InstanceView]) -> list[InstanceView]:
        return [c for c in candidates if self._roster.stage_of.get(c.instance_id) == stage]

    def _hand_over(self, source_id: InstanceId, cause: str, now_s: float) -> list[Effect]:
        source = self.view.instances.get(source_id)
        if source is None:
            return []
        effects: list[Effect] = []
        for request_id in list(source.request_ids):
            if source.migrations >= self._max_migrations:
                break
            request = self.view.requests[request_id]
            target = self._target_for(request, source, now_s)
            if target is None:
                continue
            self._migrations_started += 1
            move = StartMigration(
                cause,
                f"m{self._migrations_started}",
                request_id,
                source_id,
                target.instance.instance_id,
                MigrationReason.DRAIN if source.draining else MigrationReason.OUTGREW_STAGE,
                target.choice,
            )
            self.view.carry_out([move])
            effects.append(move)
        return effects

    def _target_for(self, request: RequestView, source: InstanceView, now_s: float) -> Chosen | None:
        if (
            request.pin_reason is not None
            or request.migration_id is not None
            or request.request_id in source.waiting
            or now_s < self._not_before_s.get(request.request_id, 0.0)
        ):
            return None
        remaining = request.prompt_tokens + request.max_output_tokens - request.tokens
        if remaining < self._min_remaining_tokens:
            return None
        candidates = self.view.able(request, self.view.available())
        if not candidates:
            return None
        home = self._roster.stage_of.get(source.instance_id)  # None if the source drains
        wanted = self._stage_of(request)
        if home is not None and wanted <= home:
            return None
        members = self._in_stage(wanted, candidates)
        return least_loaded(i for i in members if i.migrations < self._max_migrations and has_room(i, request.tokens))


INFO: Final = PolicyInfo(
    make=StaticStages,
    help="fixed stages; requests move to the next one as they grow",
    takes_layout=True,
    starts_with_plan=True,
    options_for=layout_option,
)
