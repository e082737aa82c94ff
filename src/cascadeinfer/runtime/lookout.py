"""What the operator's page is shown of a runtime: one picture of everything, and the story of a request."""

from collections.abc import Callable
from typing import Any

from cascadeinfer.core.policy import NextPlan, PlansAhead, Policy
from cascadeinfer.core.types import RequestId
from cascadeinfer.runtime.fleet import Fleet
from cascadeinfer.runtime.ledger import Ledger
from cascadeinfer.runtime.migrate import Migrator
from cascadeinfer.runtime.picture import Move, OldRequest, Scene, oldest_of, picture_of
from cascadeinfer.runtime.stories import story_of
from cascadeinfer.runtime.streams import StreamTable


class Lookout:
    """Reads a runtime's parts, when asked only; changes nothing."""

    def __init__(
        self,
        fleet: Fleet,
        streams: StreamTable,
        migrator: Migrator,
        ledger: Ledger,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            fleet: The instances.
            streams: The live requests.
            migrator: The moves under way.
            ledger: What has ended.
            policy: Says what its next plan needs, if it makes plans.
            clock: The runtime's.
        """
        self._fleet = fleet
        self._streams = streams
        self._migrator = migrator
        self._ledger = ledger
        self._policy = policy
        self._clock = clock
        self._began_s: float | None = None

    def begin(self) -> None:
        """The runtime starts now."""
        self._began_s = self._clock()

    def picture(self) -> dict[str, Any]:
        """See `picture_of`."""
        now_s = self._clock()
        return picture_of(
            Scene(
                now_s=now_s,
                began_s=now_s if self._began_s is None else self._began_s,
                instances=tuple(self._fleet),
                departed=tuple(self._fleet.departed),
                layout=self._fleet.layout,
                layout_note=self._fleet.layout_note,
                next_plan=self._next_plan(),
                streams=self._streams,
                moves=self.moves(),
                ledger=self._ledger,
                broken_pairs=tuple(self._fleet.pairs.broken()),
            )
        )

    def moves(self) -> list[Move]:
        """Moves under way in this process."""
        return [
            Move(effect.migration_id, effect.request_id, effect.source_id, effect.target_id, tokens, effect.reason)
            for effect, tokens in ((r.migration.effect, r.stream.n_tokens) for r in self._migrator.under_way())
        ]

    def oldest(self) -> list[OldRequest]:
        """The oldest live requests of this process."""
        return oldest_of(self._streams)

    def story(self, request_id: RequestId) -> dict[str, Any] | None:
        """See `story_of`; None for a request that is not live in this process."""
        stream = self._streams.get(request_id)
        return None if stream is None else story_of(stream, self._clock())

    def _next_plan(self) -> NextPlan | None:
        return self._policy.next_plan() if isinstance(self._policy, PlansAhead) else None
