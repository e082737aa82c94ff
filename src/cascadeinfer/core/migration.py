"""
The migration protocol as a transition table: ask for room, cut, transfer, resume, done, or back out at every step.

Theory of operation. The request decodes on the source until the cut. Nothing is given up before the target has reserved room
(ASKING). The cut (CUTTING) ends the request at its next token with its KV cache pinned under a lease. The target then pulls and
decodes (RESUMING); its first token ends the migration. Until then the source's copy stays pinned. When the lease is about to end,
what the target has pulled by then cannot be trusted, and the source takes the request back (RETURNING); when the source is gone, the
target computes the KV cache anew (RECOMPUTING). If the target is lost while the cut is under way, the source takes the request back
as well (WITHDRAWING, RETURNING).

The lease begins when the cut takes effect, which the shell may hear of late. What it knows without any delay is when it *sent* the
cut, and that is never later. So the deadline of the pull is counted from there (`MigrationTimes.deadline_s`): a first token that is
heard by then was computed from blocks that were still pinned, whatever was late. A token heard after it is not taken.

`TRANSITIONS` is the whole protocol; both shells (simulator, runtime) carry out its actions. The diagram in
`docs/protocols/migration.md` is generated from it (`python docs/protocols/draw.py`), and a test keeps the two alike.
"""

import enum
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.types import InstanceId, MigrationId, RequestId


class State(enum.Enum):
    """Where a migration is."""

    ASKING = "asking"
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
    """The source's final output came with a ticket."""
    CUT_EMPTY = "cut_empty"
    """The cut took effect, but there is no KV cache to pull (the request was preempted meanwhile)."""
    CUT_LATE = "cut_late"
    """The cut took effect, but it is heard of so late that the lease leaves no time to pull."""
    CUT_REFUSED = "cut_refused"
    CUT_UNDONE = "cut_undone"
    FIRST_TOKEN = "first_token"  # noqa: S105 - a token of text
    """The instance that has the request now sent its first token."""
    REQUEST_ENDED = "request_ended"
    """The request finished by itself."""
    CLIENT_LEFT = "client_left"
    SOURCE_LOST = "source_lost"
    TARGET_LOST = "target_lost"
    TIMED_OUT = "timed_out"
    """The state's time is up; in RESUMING: the deadline of the pull."""
    PLACE_SILENT = "place_silent"
    """The instance that is to compute the request anew does not answer, and another does."""


class Action(enum.Enum):
    """What a shell must do, in the order given."""

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
    (State.CUTTING, Happening.CUT_DONE): (State.RESUMING, (Action.RESUME,)),
    (State.CUTTING, Happening.CUT_EMPTY): (State.RECOMPUTING, (Action.RELEASE_ROOM, Action.RECOMPUTE)),
    # The source has most of the KV cache still, and nobody knows whether it or this front end was late.
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
    # The target did not answer in time: recomputing there might wait for ever. The source has most of the KV cache still.
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
        # The loss of an instance that has no part in the migration any more.
        (State.RECOMPUTING, Happening.SOURCE_LOST),
        (State.RETURNING, Happening.TARGET_LOST),
        (State.WITHDRAWING, Happening.TARGET_LOST),
        # Tokens the source sends while it still has the request.
        (State.ASKING, Happening.FIRST_TOKEN),
        (State.CUTTING, Happening.FIRST_TOKEN),
        (State.WITHDRAWING, Happening.FIRST_TOKEN),
        # An engine that recomputes or takes back is waited for as long as it lives and answers.
        (State.WITHDRAWING, Happening.TIMED_OUT),
        (State.RECOMPUTING, Happening.TIMED_OUT),
        (State.RETURNING, Happening.TIMED_OUT),
    }
)
"""Happenings that are legal and change nothing. Everything not named here or in TRANSITIONS is a bug of the shell."""


@dataclass(frozen=True, slots=True)
class MigrationTimes:
    """
    How long each step may take, in seconds.

    Attributes:
        ask_s: Until the target grants or refuses room.
        cut_s: Until the cut takes effect; a request is cut at its next token, so this covers one step of the source.
        resume_s: From the sending of the cut until the target's first token. Must be below the lease on the source's blocks by a
            safe margin: what is pulled after the lease has ended may be another request's KV cache.
        least_pull_s: With less than this left of `resume_s` when the cut is heard of, pulling is not tried.
    """

    ask_s: float = 2.0
    cut_s: float = 5.0
    resume_s: float = 7.0
    least_pull_s: float = 0.25

    def deadline_s(self, cut_sent_s: float) -> float:
        """When the pull must be over, on the clock of the shell that sent the cut."""
        return cut_sent_s + self.resume_s

    def cut_heard(self, cut_sent_s: float, now_s: float, n_pinned_tokens: int) -> Happening:
        """What the news of a cut means when it is heard now, with KV cache for so many tokens pinned."""
        if n_pinned_tokens <= 0:
            return Happening.CUT_EMPTY
        left_s = self.deadline_s(cut_sent_s) - now_s
        return Happening.CUT_DONE if left_s > 0 and left_s >= self.least_pull_s else Happening.CUT_LATE


@dataclass(slots=True)
class Migration:
    """
    One migration on its way.

    Attributes:
        n_tokens: Sequence length when it began; the target reserves room for it and a little more.
        story: States and happenings so far, for errors and logs.
    """

    migration_id: MigrationId
    request_id: RequestId
    source_id: InstanceId
    target_id: InstanceId
    n_tokens: int
    state: State = State.ASKING
    story: list[str] = field(default_factory=lambda: [State.ASKING.value])

    @property
    def outcome(self) -> MigrationOutcome | None:
        """How it ended, or None while it has not."""
        return OUTCOMES.get(self.state)

    @property
    def at_target(self) -> bool:
        """Whether the request is in the target's hands."""
        return self.state in {State.RESUMING, State.RECOMPUTING, State.MOVED, State.RECOMPUTED}

    def handle(self, happening: Happening) -> tuple[Action, ...]:
        """
        Follow one happening.

        Returns:
            What to do now, in order.

        Raises:
            InvalidTransition: The table does not allow it in this state; nothing has changed.
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
        self.state, actions = TRANSITIONS[key]
        self.story += [f"({happening.value})", self.state.value]
        return actions
