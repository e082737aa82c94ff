"""
Llumnix: dispatch to the freest instance, and move running requests from the most to the least loaded.

Formula: freeness = (KV blocks - virtual usage) * block size / batch, the number of decode steps that each request there
can still take before memory runs out; infinite for an empty instance. Virtual usage is the number of blocks in use
plus, for dispatch, the demand of all waiting requests; for migration, the demand of the first waiting request only
(de-fragmentation: room is made for the head of the queue). A new request goes to the highest freeness. Every
`interval_s`, instances below `migrate_steps` are sources and those above are targets; the least free source is paired
with the freest target, and so on. A pair moves its shortest running request if that brings the two closer together
without swapping their order and leaves the target a target. At most `max_migrations` per instance run at once, counting
both directions. A draining instance has freeness minus infinity, so everything moves off it.

Inputs read: reports, corrected by what has been placed since. Edge cases: pinned, waiting and migrating requests stay;
a migration that ended where it began is not retried for `retry_s`. Virtual usage of priorities is left out, since all
requests here have the same priority. Source: Llumnix, OSDI'24, sections 4.3 and 4.4, and github.com/AlibabaPAI/llumnix:
`remaining_steps` load, pair policy `defrag` with its improvement condition, request policy `SR` (shortest running),
threshold 3 blocks per request, one migration per instance at a time.
"""

import math
from collections.abc import Sequence
from typing import Final

from cascadeinfer.core.bidask.handover import HandoverRules, movable
from cascadeinfer.core.choice import Measure, Rule
from cascadeinfer.core.effects import Effect, MigrationReason, StartMigration
from cascadeinfer.core.events import Event, InstanceReported, MigrationEnded, MigrationOutcome, RequestFinished
from cascadeinfer.core.placing.dispatch import Chosen, first_of, ranked, scored_as
from cascadeinfer.core.policies.info import PolicyInfo
from cascadeinfer.core.policies.placing import PlacingPolicy
from cascadeinfer.core.types import RequestId
from cascadeinfer.core.view import InstanceView, RequestView


class Llumnix(PlacingPolicy):
    """Dispatch by freeness and pairwise migration."""

    evacuates = False

    def __init__(
        self,
        *,
        migrate: bool = True,
        migrate_steps: float = 48.0,
        interval_s: float = 0.1,
        max_migrations: int = 1,
        retry_s: float = 1.0,
        min_remaining_tokens: int = 16,
    ) -> None:
        """
        Args:
            migrate: Whether requests move.
            migrate_steps: Freeness in decode steps below which an instance is a source; 3 blocks of 16 tokens.
            interval_s: Time between two pairings.
            max_migrations: Maximum migrations per instance, both directions together.
            retry_s: How long a request rests after a migration that ended where it began.
            min_remaining_tokens: A request that may produce fewer further tokens than this stays.
        """
        super().__init__()
        self._migrate = migrate
        self._migrate_steps = migrate_steps
        self._interval_s = interval_s
        self._max_migrations = max_migrations
        self._retry_s = retry_s
        self._rules = HandoverRules(min_remaining_tokens=min_remaining_tokens)
        self._next_s = 0.0
        self._started = 0
        self._not_before_s: dict[RequestId, float] = {}

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """See `Policy.handle`."""
        effects = super().handle(event, now_s)
        if isinstance(event, MigrationEnded) and event.outcome is MigrationOutcome.STAYED:
            self._not_before_s[event.request_id] = now_s + self._retry_s
        elif isinstance(event, RequestFinished):
            self._not_before_s.pop(event.request_id, None)
        elif isinstance(event, InstanceReported) and self._migrate and now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            effects += self._pair(event.cause, now_s)
        return effects

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Chosen:  # noqa: ARG002
        """The freest instance; the first one in a tie."""
        chosen = first_of(ranked(Measure.FREE_STEPS, _freeness, candidates), Measure.FREE_STEPS, _freeness)
        assert chosen is not None  # candidates is not empty
        return chosen

    def _pair(self, cause: str, now_s: float) -> list[Effect]:
        instances = [instance for _, instance in sorted(self.view.instances.items()) if not instance.shunned]
        free = {i.instance_id: -math.inf if i.draining else _freeness_for_migration(i) for i in instances}
        by_need = sorted(instances, key=lambda instance: free[instance.instance_id])
        sources = [i for i in by_need if free[i.instance_id] < self._migrate_steps]
        targets = [i for i in reversed(by_need) if free[i.instance_id] > self._migrate_steps]
        effects: list[Effect] = []
        for place, (source, target) in enumerate(zip(sources, targets, strict=False)):
            if max(source.migrations, target.migrations) >= self._max_migrations:
                continue
            request = self._shortest(source, target, now_s)
            if request is None or not self._is_gain(source, target, request.tokens):
                continue
            self._started += 1
            chosen = first_of(
                targets[place:],
                Measure.FREE_STEPS,
                lambda instance: free[instance.instance_id],
                Rule.PAIRED,
                instead_of=scored_as(source, free[source.instance_id]),
            )
            assert chosen is not None  # the target is one
            move = StartMigration(
                cause,
                f"m{self._started}",
                request.request_id,
                source.instance_id,
                target.instance_id,
                MigrationReason.DRAIN if source.draining else MigrationReason.REBALANCE,
                chosen.choice,
            )
            self.view.carry_out([move])
            effects.append(move)
        return effects

    def _shortest(self, source: InstanceView, target: InstanceView, now_s: float) -> RequestView | None:
        ready = movable(source, self.view.requests, self._rules)
        ready = [request for request in ready if self._not_before_s.get(request.request_id, 0.0) <= now_s]
        ready = [request for request in ready if self.view.able(request, (target,))]
        return min(ready, key=lambda request: (request.tokens, request.arrival), default=None)

    def _is_gain(self, source: InstanceView, target: InstanceView, tokens: int) -> bool:
        after_target = _freeness_for_migration(target, tokens, 1)
        if after_target <= self._migrate_steps:
            return False
        if source.draining:
            return True
        before = _freeness_for_migration(target) - _freeness_for_migration(source)
        after = after_target - _freeness_for_migration(source, -tokens, -1)
        return 0.0 < after < before or math.isinf(before)


def _freeness(instance: InstanceView) -> float:
    """Decode steps left, counting all waiting requests."""
    requests = instance.committed_requests
    return instance.free_blocks() * instance.capacity.block_size_tokens / requests if requests else math.inf


def _freeness_for_migration(instance: InstanceView, more_tokens: int = 0, more_requests: int = 0) -> float:
    """Decode steps left, counting only the first waiting request, with `more_tokens` and `more_requests` added."""
    capacity = instance.capacity
    later = list(instance.waiting)[1:]
    free_blocks = instance.free_blocks() + sum([capacity.blocks_for(instance.request_ids[r]) for r in later])
    free_blocks -= capacity.blocks_for(more_tokens)
    requests = instance.committed_requests - len(later) + more_requests
    return free_blocks * capacity.block_size_tokens / requests if requests > 0 else math.inf


INFO: Final = PolicyInfo(
    make=Llumnix, help="the freest instance; running requests move from the least free to the freest"
)
