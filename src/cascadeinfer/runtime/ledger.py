"""
What has ended since the start, in short: requests by outcome; moves by outcome and reason, the latest one by one.

Kept for the operator's page (`runtime/picture.py`), which needs what Prometheus' counters do not have: which two
instances a move was between, and percentiles of pauses. Memory is bounded. With several front-end processes, each has a
ledger; process 0 enters what the others have sent it (`take`) into its own.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.effects import MigrationReason, StartMigration
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId

RECENT_MOVES: Final = 512
"""More than 64 instances with three moves each end within a second."""
PAUSES: Final = 500
"""Latest pauses per outcome and reason: the 99th percentile then rests on five of them."""


@dataclass(frozen=True, slots=True)
class EndedMove:
    """
    A migration that has ended.

    Attributes:
        n_tokens: The request's length at the end; 0 if it was no longer live.
        pause_s: Between its last token at the source and its first at the target; None if it did not get that far.
        at_s: When it ended, on the runtime's clock.
    """

    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    n_tokens: int
    reason: MigrationReason
    outcome: MigrationOutcome
    detail: str
    pause_s: float | None
    at_s: float


@dataclass(slots=True)
class MoveTally:
    """
    Moves of one outcome and one reason.

    Attributes:
        count: All since the start.
        details: The same by detail, which says why a request stayed.
        pauses_s: The latest pauses.
    """

    count: int = 0
    details: Counter[str] = field(default_factory=Counter)
    pauses_s: deque[float] = field(default_factory=lambda: deque(maxlen=PAUSES))


class Ledger:
    """
    See the module header.

    Attributes:
        requests: Requests that ended, by outcome, as in `cascadeinfer_requests_total`.
        moves: By outcome and reason.
        recent: The latest moves, the oldest first.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """
        Args:
            clock: The runtime's.
        """
        self._clock = clock
        self.requests: Counter[str] = Counter()
        self.moves: dict[tuple[MigrationOutcome, MigrationReason], MoveTally] = {}
        self.recent: deque[EndedMove] = deque(maxlen=RECENT_MOVES)
        self._untold: tuple[list[EndedMove], Counter[str]] | None = None

    def request_ended(self, outcome: str) -> None:
        """A request ended."""
        self.enter_requests({outcome: 1})

    def move_ended(self, effect: StartMigration, ended: MigrationEnded, n_tokens: int, pause_s: float | None) -> None:
        """A migration ended, perhaps before it began."""
        self.enter_move(
            EndedMove(
                effect.migration_id, effect.request_id, effect.source_id, effect.target_id, n_tokens, effect.reason,
                ended.outcome, ended.detail, pause_s, self._clock(),
            )
        )  # fmt: skip

    def enter_requests(self, ended: Mapping[str, int]) -> None:
        """Add requests that ended, by outcome."""
        self.requests.update(ended)
        if self._untold is not None:
            self._untold[1].update(ended)

    def enter_move(self, move: EndedMove) -> None:
        """Add a move, of this process or another."""
        tally = self.moves.setdefault((move.outcome, move.reason), MoveTally())
        tally.count += 1
        tally.details[move.detail] += 1
        if move.pause_s is not None:
            tally.pauses_s.append(move.pause_s)
        self.recent.append(move)
        if self._untold is not None:
            self._untold[0].append(move)

    def take(self) -> tuple[list[EndedMove], dict[str, int]]:
        """Moves, and requests by outcome, that ended since the last call; nothing is kept for it before the first."""
        moves, requests = self._untold or ([], Counter())
        self._untold = ([], Counter())
        return moves, dict(requests)
