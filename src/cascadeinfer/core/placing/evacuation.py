"""
Empties a draining instance, for policies that otherwise never migrate a request.

Running requests go to the least loaded instance with room, the longest first (it would delay the drain most), at most
`max_migrations` per instance at once, in either direction. Waiting requests run first and then move; pinned ones, and
those about to end, finish there. A request whose migration failed is retried after `retry_s`.
"""

from cascadeinfer.core.bidask.handover import HandoverRules, movable
from cascadeinfer.core.effects import MigrationReason, StartMigration
from cascadeinfer.core.events import Event, MigrationEnded, MigrationOutcome, RequestFinished
from cascadeinfer.core.placing.dispatch import has_room, least_loaded
from cascadeinfer.core.types import RequestId
from cascadeinfer.core.view import ClusterView, InstanceView

MAX_MIGRATIONS_PER_INSTANCE = 3
"""Paper, section on load balance: more at once slows decoding on both sides."""


class Evacuation:
    """See the module header."""

    def __init__(
        self, view: ClusterView, *, max_migrations: int = MAX_MIGRATIONS_PER_INSTANCE, retry_s: float = 0.5
    ) -> None:
        """
        Args:
            view: The policy's books.
            max_migrations: Per instance, both directions together.
            retry_s: Pause of a request after a failed migration.
        """
        self._view = view
        self._max_migrations = max_migrations
        self._retry_s = retry_s
        self._rules = HandoverRules()
        self._not_before_s: dict[RequestId, float] = {}
        self._started = 0

    def note(self, event: Event, now_s: float) -> None:
        """Remember failed migrations for as long as they matter."""
        if isinstance(event, MigrationEnded) and event.outcome is MigrationOutcome.STAYED:
            if event.request_id in self._view.requests:
                self._not_before_s[event.request_id] = now_s + self._retry_s
        elif isinstance(event, RequestFinished):
            self._not_before_s.pop(event.request_id, None)

    def moves(self, source: InstanceView, cause: str, now_s: float) -> list[StartMigration]:
        """Migrations to start now; they are recorded in the books."""
        begun: list[StartMigration] = []
        ready = movable(source, self._view.requests, self._rules)
        for request in sorted(ready, key=lambda request: (-request.tokens, request.arrival)):
            if source.migrations >= self._max_migrations:
                break
            if now_s < self._not_before_s.get(request.request_id, 0.0):
                continue
            able = self._view.able(request, self._view.available())
            target = least_loaded(
                i for i in able if i.migrations < self._max_migrations and has_room(i, request.tokens)
            )
            if target is None:
                continue
            self._started += 1
            move = StartMigration(
                cause,
                f"drain{self._started}",
                request.request_id,
                source.instance_id,
                target.instance.instance_id,
                MigrationReason.DRAIN,
                target.choice,
            )
            self._view.carry_out([move])
            begun.append(move)
        return begun
