"""
The migration protocol: a transition table with its limits and reasons.

A migration asks for room, cuts the request, transfers its KV cache, resumes it and is done. It can back out at every
step.

Theory of operation. The request decodes on the source until the cut, and nothing is given up before the target has
reserved room (ASKING). The cut (CUTTING) ends the request at its next token, with its KV cache pinned under a lease.
The target then pulls and decodes (RESUMING), and its first token ends the migration. Until then the source's copy stays
pinned. If the lease is about to expire, what the target has pulled can no longer be trusted, and the source takes the
request back (RETURNING). If the source dies, the target recomputes the KV cache (RECOMPUTING). If the target is lost
during the cut, the source takes the request back as well (WITHDRAWING, RETURNING).

The lease begins when the cut takes effect, which the shell may hear of late. It does know when it *sent* the cut, and
that is never later, so the deadline of the pull is counted from there (`Migration.deadline_s`). A first token received
by then was computed from blocks that were still pinned, whatever else was late. A later token is discarded.

A request that is parked with its first token (`core/parking.py`) has been cut already. Its migration begins in PARKED
and differs in nothing else; the lease is renewed when it begins, and its deadline is counted from there.

All decisions are made here: what follows what (`TRANSITIONS`), how long each state may last and how much room is
requested (`MigrationLimits`), and which reason the record gives (`Migration.detail`). The reasons for refusals are in
`core/refusals.py`. Both shells (simulator and runtime) report to a `Migration` what has happened and carry out its
actions; a test walks the table and feeds every path to both. `docs/protocols/migration.md` is generated from this
module (`python docs/protocols/draw.py`), and a test keeps the two in step.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import Final, Self

from cascadeinfer.core.effects import StartMigration
from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.events import MigrationEnded, MigrationOutcome
from cascadeinfer.core.refusals import Refusal
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId


class State(enum.Enum):
    """The states of a migration."""

    ASKING = "asking"
    PARKED = "parked"
    """The first state of a request that is parked (`core/parking.py`): room is asked for, nothing is left to cut."""
    CUTTING = "cutting"
    WITHDRAWING = "withdrawing"
    RESUMING = "resuming"
    RECOMPUTING = "recomputing"
    RETURNING = "returning"
    MOVED = "moved"
    RECOMPUTED = "recomputed"
    STAYED = "stayed"
    ENDED = "ended"
    LOST = "lost"


class Happening(enum.Enum):
    """What can happen to a migration."""

    ROOM_GRANTED = "room_granted"
    ROOM_REFUSED = "room_refused"
    CUT_DONE = "cut_done"
    """The source's final output arrived, with a ticket."""
    CUT_EMPTY = "cut_empty"
    """The cut took effect, but there is no KV cache to pull (the request was preempted in the meantime)."""
    CUT_LATE = "cut_late"
    """The cut took effect, but the shell heard of it so late that the lease leaves no time to pull."""
    CUT_REFUSED = "cut_refused"
    CUT_UNDONE = "cut_undone"
    PIN_LOST = "pin_lost"
    """The lease of a parked request was over when it was to be renewed."""
    FIRST_TOKEN = "first_token"  # noqa: S105 - a token of text
    """The instance that now has the request sent its first token."""
    REQUEST_ENDED = "request_ended"
    """The request finished by itself."""
    CLIENT_LEFT = "client_left"
    SOURCE_LOST = "source_lost"
    TARGET_LOST = "target_lost"
    TIMED_OUT = "timed_out"
    """The time limit of the state has expired; in RESUMING, the deadline of the pull."""
    PLACE_SILENT = "place_silent"
    """The instance that should recompute the request does not answer, while another one does."""


class Action(enum.Enum):
    """What a shell must do, in the given order."""

    ASK_ROOM = "ask_room"
    CUT = "cut"
    UNDO_CUT = "undo_cut"
    RESUME = "resume"
    """Add the request at the target with its ticket."""
    RECOMPUTE = "recompute"
    """Add the request at the target without a ticket."""
    TAKE_BACK = "take_back"
    """Add the request at the source without a ticket."""
    RELEASE_ROOM = "release_room"
    RELEASE_PIN = "release_pin"
    ABORT_AT_SOURCE = "abort_at_source"
    ABORT_AT_TARGET = "abort_at_target"


OUTCOMES: Final = {
    State.MOVED: MigrationOutcome.MOVED,
    State.RECOMPUTED: MigrationOutcome.RECOMPUTED,
    State.STAYED: MigrationOutcome.STAYED,
    State.ENDED: MigrationOutcome.ENDED,
    State.LOST: MigrationOutcome.LOST,
}
"""The final states."""

TRANSITIONS: Final[dict[tuple[State, Happening], tuple[State, tuple[Action, ...]]]] = {
    (State.ASKING, Happening.ROOM_GRANTED): (State.CUTTING, (Action.CUT,)),
    (State.ASKING, Happening.ROOM_REFUSED): (State.STAYED, ()),
    (State.ASKING, Happening.REQUEST_ENDED): (State.ENDED, (Action.RELEASE_ROOM,)),
    (State.ASKING, Happening.CLIENT_LEFT): (State.ENDED, (Action.ABORT_AT_SOURCE, Action.RELEASE_ROOM)),
    (State.ASKING, Happening.SOURCE_LOST): (State.LOST, (Action.RELEASE_ROOM,)),
    (State.ASKING, Happening.TARGET_LOST): (State.STAYED, ()),
    (State.ASKING, Happening.TIMED_OUT): (State.STAYED, (Action.RELEASE_ROOM,)),
    (State.PARKED, Happening.ROOM_GRANTED): (State.RESUMING, (Action.RESUME,)),
    # The source has its tokens, and most of its KV cache in the prefix cache.
    (State.PARKED, Happening.PIN_LOST): (State.RETURNING, (Action.RELEASE_PIN, Action.TAKE_BACK)),
    (State.PARKED, Happening.ROOM_REFUSED): (State.STAYED, ()),
    (State.PARKED, Happening.REQUEST_ENDED): (State.ENDED, (Action.RELEASE_PIN, Action.RELEASE_ROOM)),
    (State.PARKED, Happening.CLIENT_LEFT): (
        State.ENDED,
        (Action.ABORT_AT_SOURCE, Action.RELEASE_PIN, Action.RELEASE_ROOM),
    ),
    (State.PARKED, Happening.SOURCE_LOST): (State.LOST, (Action.RELEASE_ROOM,)),
    (State.PARKED, Happening.TARGET_LOST): (State.STAYED, ()),
    (State.PARKED, Happening.TIMED_OUT): (State.STAYED, (Action.RELEASE_ROOM,)),
    (State.CUTTING, Happening.CUT_DONE): (State.RESUMING, (Action.RESUME,)),
    (State.CUTTING, Happening.CUT_EMPTY): (State.RECOMPUTING, (Action.RELEASE_ROOM, Action.RECOMPUTE)),
    # The source still has most of the KV cache, and it is unknown whether the source or this front end was late.
    (State.CUTTING, Happening.CUT_LATE): (
        State.RETURNING,
        (Action.RELEASE_ROOM, Action.RELEASE_PIN, Action.TAKE_BACK),
    ),
    (State.CUTTING, Happening.CUT_REFUSED): (State.STAYED, (Action.RELEASE_ROOM,)),
    (State.CUTTING, Happening.REQUEST_ENDED): (State.ENDED, (Action.RELEASE_ROOM,)),
    (State.CUTTING, Happening.CLIENT_LEFT): (
        State.ENDED,
        (Action.ABORT_AT_SOURCE, Action.RELEASE_PIN, Action.RELEASE_ROOM),
    ),
    (State.CUTTING, Happening.SOURCE_LOST): (State.LOST, (Action.RELEASE_ROOM,)),
    (State.CUTTING, Happening.TARGET_LOST): (State.WITHDRAWING, (Action.UNDO_CUT,)),
    (State.CUTTING, Happening.TIMED_OUT): (State.WITHDRAWING, (Action.UNDO_CUT, Action.RELEASE_ROOM)),
    (State.WITHDRAWING, Happening.CUT_UNDONE): (State.STAYED, ()),
    (State.WITHDRAWING, Happening.CUT_REFUSED): (State.STAYED, ()),
    (State.WITHDRAWING, Happening.CUT_DONE): (State.RETURNING, (Action.RELEASE_PIN, Action.TAKE_BACK)),
    (State.WITHDRAWING, Happening.CUT_EMPTY): (State.RETURNING, (Action.TAKE_BACK,)),
    (State.WITHDRAWING, Happening.CUT_LATE): (State.RETURNING, (Action.RELEASE_PIN, Action.TAKE_BACK)),
    (State.WITHDRAWING, Happening.REQUEST_ENDED): (State.ENDED, ()),
    (State.WITHDRAWING, Happening.CLIENT_LEFT): (State.ENDED, (Action.ABORT_AT_SOURCE, Action.RELEASE_PIN)),
    (State.WITHDRAWING, Happening.SOURCE_LOST): (State.LOST, ()),
    (State.RESUMING, Happening.FIRST_TOKEN): (State.MOVED, ()),
    (State.RESUMING, Happening.CLIENT_LEFT): (
        State.ENDED,
        (Action.ABORT_AT_TARGET, Action.RELEASE_PIN, Action.RELEASE_ROOM),
    ),
    (State.RESUMING, Happening.REQUEST_ENDED): (State.ENDED, (Action.RELEASE_PIN, Action.RELEASE_ROOM)),
    (State.RESUMING, Happening.SOURCE_LOST): (State.RECOMPUTING, (Action.ABORT_AT_TARGET, Action.RECOMPUTE)),
    # The target did not answer in time, so recomputing there might wait forever. The source still has most of the KV
    # cache.
    (State.RESUMING, Happening.TIMED_OUT): (
        State.RETURNING,
        (Action.ABORT_AT_TARGET, Action.RELEASE_PIN, Action.TAKE_BACK),
    ),
    (State.RESUMING, Happening.TARGET_LOST): (State.LOST, (Action.RELEASE_PIN,)),
    (State.RECOMPUTING, Happening.FIRST_TOKEN): (State.RECOMPUTED, ()),
    (State.RECOMPUTING, Happening.REQUEST_ENDED): (State.ENDED, ()),
    (State.RECOMPUTING, Happening.CLIENT_LEFT): (State.ENDED, (Action.ABORT_AT_TARGET,)),
    (State.RECOMPUTING, Happening.TARGET_LOST): (State.LOST, ()),
    (State.RECOMPUTING, Happening.PLACE_SILENT): (State.LOST, (Action.ABORT_AT_TARGET,)),
    (State.RETURNING, Happening.FIRST_TOKEN): (State.STAYED, ()),
    (State.RETURNING, Happening.REQUEST_ENDED): (State.ENDED, ()),
    (State.RETURNING, Happening.CLIENT_LEFT): (State.ENDED, (Action.ABORT_AT_SOURCE,)),
    (State.RETURNING, Happening.SOURCE_LOST): (State.LOST, ()),
    (State.RETURNING, Happening.PLACE_SILENT): (State.LOST, (Action.ABORT_AT_SOURCE,)),
}

IGNORED: Final = frozenset(
    {
        # Loss of an instance that no longer takes part in the migration.
        (State.RECOMPUTING, Happening.SOURCE_LOST),
        (State.RETURNING, Happening.TARGET_LOST),
        (State.WITHDRAWING, Happening.TARGET_LOST),
        # Tokens that the source sends while it still has the request.
        (State.ASKING, Happening.FIRST_TOKEN),
        (State.CUTTING, Happening.FIRST_TOKEN),
        (State.WITHDRAWING, Happening.FIRST_TOKEN),
        # An engine that recomputes or takes back may take as long as it needs, provided that it lives and answers.
        (State.WITHDRAWING, Happening.TIMED_OUT),
        (State.RECOMPUTING, Happening.TIMED_OUT),
        (State.RETURNING, Happening.TIMED_OUT),
    }
)
"""Happenings that are legal and change nothing. Any other pair that is not in TRANSITIONS is a bug of the shell."""


_AS_ASKED: Final = frozenset({Happening.ROOM_GRANTED, Happening.CUT_DONE, Happening.FIRST_TOKEN})
"""The instance that was asked did as it was asked."""
_NEWS_WHILE_WITHDRAWING: Final = frozenset({Happening.REQUEST_ENDED, Happening.CLIENT_LEFT, Happening.SOURCE_LOST})
"""The reason for withdrawing is known by then; other answers of the source add nothing."""


def explains(state: State, happening: Happening) -> bool:
    """Whether this happening, in this state, is a reason for how the migration ends rather than an expected answer."""
    if (state, happening) in IGNORED:
        return False
    return happening in _NEWS_WHILE_WITHDRAWING if state is State.WITHDRAWING else happening not in _AS_ASKED


class NotBegun(enum.StrEnum):
    """Why a requested migration ends before its first state. The values become the record's `detail`."""

    STALE = "stale"
    """The request has ended, or a death or another migration has moved it, since the policy decided."""
    SUSPECTED = "suspected"
    """Instances have died under the request, so it is kept where it is."""


def not_begun(effect: StartMigration, why: NotBegun, *, is_live: bool) -> MigrationEnded:
    """The end of a migration that does not begin; `is_live` says whether the request is still running."""
    return effect.ended(MigrationOutcome.STAYED if is_live else MigrationOutcome.ENDED, why.value)


ROOM_SLACK_TOKENS: Final = 64
"""Room requested beyond the request's length, because it keeps decoding until it is cut."""
LEASE_MARGIN_S: Final = 3.0
"""A pull must be complete this long before the end of a lease that began when the cut was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLimits:
    """
    How long each step may take, in seconds, and how much a request may grow during the migration.

    Attributes:
        ask_s: Until the target grants or refuses room.
        cut_s: Until the cut takes effect. A request is cut at its next token, so this covers one step of the source.
        resume_s: From sending the cut until the target's first token. Must be below the lease on the source's blocks by
            a safe margin: what is pulled after the lease has expired may be another request's KV cache.
        least_pull_s: No pull is attempted if less than this is left of `resume_s` when the cut is heard of.
        room_slack_tokens: Room requested of the target beyond the length at the start.
    """

    ask_s: float = 2.0
    cut_s: float = 5.0
    resume_s: float = 7.0
    least_pull_s: float = 0.25
    room_slack_tokens: int = ROOM_SLACK_TOKENS

    @classmethod
    def under_lease(cls, lease_s: float) -> Self:
        """The usual limits for engines that pin a cut request's blocks for `lease_s` seconds."""
        return cls(resume_s=lease_s - LEASE_MARGIN_S)


@dataclass(slots=True)
class Migration:
    """
    One migration in progress.

    Attributes:
        effect: The policy's order.
        n_tokens: Sequence length when the migration began.
        limits: Time limits and slack.
        state: The current state.
        cut_sent_s: When the cut was sent, on the shell's clock. The lease on the source's blocks begins then or later.
        detail: The reason for the outcome as far as it is known: the last happening that explains anything, with its
            refusal; empty if everything went as asked. A metric label.
        story: States and happenings so far, for errors and logs.
    """

    effect: StartMigration
    n_tokens: int
    limits: MigrationLimits = field(default_factory=MigrationLimits)
    state: State = State.ASKING
    cut_sent_s: float = math.nan
    detail: str = ""
    story: list[str] = field(default_factory=lambda: [State.ASKING.value])

    @classmethod
    def of_parked(cls, effect: StartMigration, n_tokens: int, limits: MigrationLimits, now_s: float) -> Self:
        """The migration of a request that is parked, whose lease is renewed now."""
        return cls(effect, n_tokens, limits, State.PARKED, now_s, story=[State.PARKED.value])

    @property
    def migration_id(self) -> MigrationId:
        """The migration's id, chosen by the policy."""
        return self.effect.migration_id

    @property
    def request_id(self) -> RequestId:
        """The request that moves."""
        return self.effect.request_id

    @property
    def source_id(self) -> InstanceId:
        """The instance the request is on when the migration begins."""
        return self.effect.source_id

    @property
    def target_id(self) -> InstanceId:
        """The instance the request is to move to."""
        return self.effect.target_id

    @property
    def outcome(self) -> MigrationOutcome | None:
        """How the migration ended, or None while it is in progress."""
        return OUTCOMES.get(self.state)

    @property
    def at_target(self) -> bool:
        """Whether the target has the request."""
        return self.state in {State.RESUMING, State.RECOMPUTING, State.MOVED, State.RECOMPUTED}

    @property
    def room_tokens(self) -> int:
        """Tokens that the target is asked to reserve room for."""
        return self.n_tokens + self.limits.room_slack_tokens

    @property
    def deadline_s(self) -> float:
        """When the pull must be complete, on the clock of the shell that sent the cut."""
        return self.cut_sent_s + self.limits.resume_s

    def limit_s(self, now_s: float) -> float | None:
        """Seconds that the state beginning now may last until TIMED_OUT; None for no limit."""
        match self.state:
            case State.ASKING | State.PARKED:
                return self.limits.ask_s
            case State.CUTTING:
                return self.limits.cut_s
            case State.RESUMING:
                return self.deadline_s - now_s
            case _:
                return None

    def is_overdue(self, now_s: float) -> bool:
        """Whether the deadline of the pull has passed. True even if the timer that would report it is itself late."""
        return self.state is State.RESUMING and now_s >= self.deadline_s

    def has_outgrown_room(self, n_tokens: int) -> bool:
        """Whether a request of this length must not be cut, because its next token would exceed the room requested."""
        return n_tokens + 1 > self.room_tokens

    def cut_heard(self, now_s: float, n_pinned_tokens: int) -> Happening:
        """Classify the completion of the cut, heard of now, with KV cache pinned for `n_pinned_tokens` tokens."""
        if n_pinned_tokens <= 0:
            return Happening.CUT_EMPTY
        left_s = self.deadline_s - now_s
        return Happening.CUT_DONE if left_s > 0 and left_s >= self.limits.least_pull_s else Happening.CUT_LATE

    def handle(self, happening: Happening, now_s: float, refusal: Refusal | None = None) -> tuple[Action, ...]:
        """
        Make the transition for one happening.

        Args:
            happening: What has happened.
            now_s: When, on the shell's clock.
            refusal: The reason, with ROOM_REFUSED and CUT_REFUSED.

        Returns:
            What to do now, in order.

        Raises:
            InvalidTransition: The table does not allow this happening in this state; nothing has changed.
        """
        key = (self.state, happening)
        if key in IGNORED:
            return ()
        if key not in TRANSITIONS:
            raise InvalidTransition(
                f"migration {self.migration_id} of request {self.request_id}",
                state=self.state.value,
                event=happening.value,
                story=tuple(self.story),
            )
        if explains(*key):
            self.detail = happening.value if refusal is None else f"{happening.value}:{refusal.value}"
        self.state, actions = TRANSITIONS[key]
        self.story += [f"({happening.value})", self.state.value]
        if Action.CUT in actions:
            self.cut_sent_s = now_s
        return actions

    def ended(self) -> MigrationEnded:
        """The event that reports the end. Call it only once there is an outcome."""
        assert self.outcome is not None, self.story
        return self.effect.ended(self.outcome, self.detail)
