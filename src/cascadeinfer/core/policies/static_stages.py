"""
Length stages from the configuration: the first version of the cascade.

Dispatch: by prompt length to its stage, least loaded inside. Hand-over: a request whose length has left its stage's range moves
to the stage of its length as soon as an instance there has room; until then it decodes on where it is and is tried again
after `retry_s`. At most `max_migrations` per instance at once, either way (paper: 3).

Inputs read: reports (lengths, load), the layout. Edge cases: a stage whose instances are all gone or draining is served by the
nearest stage that has any (shorter one first at equal distance); a request above `max_tokens` left is not worth a move when it
has fewer than `min_remaining_tokens` to go; a pinned request stays. Source: arXiv 2512.19179, with fixed ranges.
"""

from collections.abc import Sequence

from cascadeinfer.core.dispatch import has_room, least_loaded, pick
from cascadeinfer.core.effects import Effect, MigrationReason, PublishLayout, StartMigration
from cascadeinfer.core.events import (
    Event,
    InstanceDraining,
    InstanceReported,
    MigrationEnded,
    MigrationOutcome,
    RequestFinished,
)
from cascadeinfer.core.plan.layout import StageLayout
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.core.view import InstanceView, RequestView

MAX_MIGRATIONS_PER_INSTANCE = 3
"""Paper, section on load balance: more at once slows decoding on both sides."""


class StaticStages(PlacingPolicy):
    """Fixed length ranges with live hand-over."""

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
            layout: The stages; its instance ids need not be up yet.
            max_migrations: Per instance, both directions together.
            retry_s: Seconds before a request whose move failed or found no room is tried again.
            min_remaining_tokens: A request with fewer tokens left to generate stays.

        """
        super().__init__()
        self.layout = layout
        self._max_migrations = max_migrations
        self._retry_s = retry_s
        self._min_remaining_tokens = min_remaining_tokens
        self._not_before_s: dict[RequestId, float] = {}
        self._published = False
        self._migrations_started = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects: list[Effect] = [] if self._published else [PublishLayout(event.cause, self.layout)]
        self._published = True
        effects += super().handle(event, now_s)
        if isinstance(event, MigrationEnded) and event.outcome is MigrationOutcome.STAYED:
            self._not_before_s[event.request_id] = now_s + self._retry_s
        if isinstance(event, RequestFinished):
            self._not_before_s.pop(event.request_id, None)
        if isinstance(event, InstanceReported | InstanceDraining):
            effects += self._hand_over(event.instance_id, event.cause, now_s)
        return effects

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> InstanceView:
        """The least loaded instance of the request's stage, or of the nearest stage that has any."""
        by_stage = self._candidates_by_distance(request.tokens, candidates)
        chosen = pick(by_stage, request.tokens)
        assert chosen is not None  # candidates is not empty
        return chosen

    def _candidates_by_distance(self, length_tokens: int, candidates: Sequence[InstanceView]) -> Sequence[InstanceView]:
        wanted = self.layout.stage_index_of(length_tokens)
        distance_of: dict[InstanceId, tuple[int, int]] = {}
        for candidate in candidates:
            index = self.layout.stage_index_of_instance(candidate.instance_id)
            if index is not None:
                distance_of[candidate.instance_id] = (abs(index - wanted), index)
        if not distance_of:
            return candidates
        nearest = min(distance_of.values())
        return [c for c in candidates if distance_of.get(c.instance_id) == nearest]

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
                target.instance_id,
                MigrationReason.DRAIN if source.draining else MigrationReason.OUTGREW_STAGE,
            )
            self.view.carry_out([move])
            effects.append(move)
        return effects

    def _target_for(self, request: RequestView, source: InstanceView, now_s: float) -> InstanceView | None:
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
        home = self.layout.stage_index_of_instance(source.instance_id)
        if not source.draining and home is not None and request.tokens < self.layout.stages[home].range.hi_tokens:
            return None
        candidates = [i for i in self.view.available() if i.instance_id != source.instance_id]
        nearest = self._candidates_by_distance(request.tokens, candidates)
        if not source.draining and home is not None:
            nearest = [i for i in nearest if (self.layout.stage_index_of_instance(i.instance_id) or 0) > home]
        return least_loaded(i for i in nearest if i.migrations < self._max_migrations and has_room(i, request.tokens))
