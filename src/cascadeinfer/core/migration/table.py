"""The transition table of migrations: what follows what, and what a shell does then. The package tells how it works."""

import enum
from typing import Final

from cascadeinfer.core.events import MigrationOutcome


class State(enum.Enum):
    """The states of a migration."""

    ASKING = "asking"
    PARKED = "parked"
    """The first state of a request that is parked (`core/parking.py`): room is asked for, nothing is left to cut."""
    COPYING = "copying"
    """The target pulls the full blocks of the request, which decodes on."""
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
    ROOM_TO_COPY = "room_to_copy"
    """Room is granted, and it pays to copy the full blocks before the cut."""
    ROOM_REFUSED = "room_refused"
    COPIED = "copied"
    """The target has the full blocks."""
    NOT_COPIED = "not_copied"
    """The source has no full blocks to give, or the target could not pull them."""
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
    COPY = "copy"
    """Have the source pin its full blocks and the target pull them."""
    RELEASE_COPY = "release_copy"
    """The source need not pin its full blocks any more."""
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
    (State.ASKING, Happening.ROOM_TO_COPY): (State.COPYING, (Action.COPY,)),
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
    (State.COPYING, Happening.COPIED): (State.CUTTING, (Action.CUT, Action.RELEASE_COPY)),
    (State.COPYING, Happening.NOT_COPIED): (State.CUTTING, (Action.CUT, Action.RELEASE_COPY)),
    (State.COPYING, Happening.REQUEST_ENDED): (State.ENDED, (Action.RELEASE_COPY, Action.RELEASE_ROOM)),
    (State.COPYING, Happening.CLIENT_LEFT): (
        State.ENDED,
        (Action.ABORT_AT_SOURCE, Action.RELEASE_COPY, Action.RELEASE_ROOM),
    ),
    (State.COPYING, Happening.SOURCE_LOST): (State.LOST, (Action.RELEASE_ROOM,)),
    (State.COPYING, Happening.TARGET_LOST): (State.STAYED, (Action.RELEASE_COPY,)),
    (State.COPYING, Happening.TIMED_OUT): (State.STAYED, (Action.RELEASE_COPY, Action.RELEASE_ROOM)),
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
        (State.COPYING, Happening.FIRST_TOKEN),
        (State.CUTTING, Happening.FIRST_TOKEN),
        (State.WITHDRAWING, Happening.FIRST_TOKEN),
        # An engine that recomputes or takes back may take as long as it needs, provided that it lives and answers.
        (State.WITHDRAWING, Happening.TIMED_OUT),
        (State.RECOMPUTING, Happening.TIMED_OUT),
        (State.RETURNING, Happening.TIMED_OUT),
    }
)
"""Happenings that are legal and change nothing. Any other pair that is not in TRANSITIONS is a bug of the shell."""


_AS_ASKED: Final = frozenset(
    {
        Happening.ROOM_GRANTED,
        Happening.ROOM_TO_COPY,
        Happening.COPIED,
        Happening.NOT_COPIED,
        Happening.CUT_DONE,
        Happening.FIRST_TOKEN,
    }
)
"""The instance that was asked did as it was asked, or the migration goes on as if it had never been asked."""
_NEWS_WHILE_WITHDRAWING: Final = frozenset({Happening.REQUEST_ENDED, Happening.CLIENT_LEFT, Happening.SOURCE_LOST})
"""The reason for withdrawing is known by then; other answers of the source add nothing."""


def explains(state: State, happening: Happening) -> bool:
    """Whether this happening, in this state, is a reason for how the migration ends rather than an expected answer."""
    if (state, happening) in IGNORED:
        return False
    return happening in _NEWS_WHILE_WITHDRAWING if state is State.WITHDRAWING else happening not in _AS_ASKED
