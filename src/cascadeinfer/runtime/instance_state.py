"""
An instance's life as a transition table, from start and join to suspicion, drain, death, restart and removal.

Theory of operation. An instance is *added* to the fleet, its engine is *started*, does the handshake with those that
are up, and *joins* them. It is then in use until it dies, is killed on purpose (*condemned*) or has been drained. A
dead instance is restarted after a pause; a drained one is removed for good. An overdue load report makes an instance in
use *suspect*, draining or not, until it is trusted again.

`TRANSITIONS` is the whole life, and `ALLOWED` lists what may be done with an instance in each state. Every component
that holds an instance asks these tables and keeps no flags. `docs/protocols/instance.md` is generated from them
(`python docs/protocols/draw.py`).

This module knows no engine, clock or policy. A policy's knowledge of an instance (`core/view.py`, `core/roster.py`)
follows from the events that the runtime sends with some of the transitions, and is less detailed.
"""

import enum
from collections import deque
from typing import Final, NamedTuple

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.types import InstanceId

REMEMBERED: Final = 16
"""Passages kept per instance: three or four deaths with the restarts between them."""


class State(enum.Enum):
    """State of an instance in its life."""

    ADDED = "added"
    """In the directory; its first start has not begun."""
    STARTING = "starting"
    JOINING = "joining"
    """Its engine answers and shakes hands with those that are up; nobody uses it yet."""
    UP = "up"
    SUSPECT = "suspect"
    """In use, and its load report is overdue."""
    CONDEMNED = "condemned"
    """Killed for a reason that no request caused; its death is about to be noticed."""
    DRAINING = "draining"
    DRAINING_SUSPECT = "draining_suspect"
    DOOMED = "doomed"
    """Condemned, and drained before or after that: its death is its end."""
    DOWN = "down"
    """Dead, and waiting for its next start."""
    RESTARTING = "restarting"
    REJOINING = "rejoining"
    """What JOINING is after a restart."""
    REMOVING = "removing"
    """Out of use for good; what is left of it is being stopped."""
    GONE = "gone"


class Happening(enum.Enum):
    """What can happen to an instance."""

    START = "start"
    STARTED = "started"
    """Its engine answers and has said its capacity."""
    START_FAILED = "start_failed"
    JOINED = "joined"
    SUSPECTED = "suspected"
    TRUSTED = "trusted"
    """It has answered in time after a suspicion."""
    CONDEMNED = "condemned"
    DIED = "died"
    """Its process ended, it was killed as hung, or it could not be connected."""
    DRAIN = "drain"
    """An operator wants it to be emptied and removed."""
    EMPTIED = "emptied"
    DRAIN_OVERDUE = "drain_overdue"
    """The time to hand its requests over is up."""
    REMOVED = "removed"


class Deed(enum.Enum):
    """What may be done with an instance."""

    BE_ASKED = "be_asked"
    """For its load."""
    RUN = "run"
    """Requests run there, leave it by migration, and reach it by the front end's calls."""
    TAKE = "take"
    """New requests are placed there and running ones moved there."""
    TAKE_IN_NEED = "take_in_need"
    """The same when no instance in use answers: somebody must."""
    JOIN = "join"
    BE_RESTARTED = "be_restarted"
    BE_DRAINED = "be_drained"
    BE_REMOVED = "be_removed"


TRANSITIONS: Final[dict[tuple[State, Happening], State]] = {
    (State.ADDED, Happening.START): State.STARTING,
    (State.ADDED, Happening.DRAIN): State.REMOVING,
    (State.STARTING, Happening.STARTED): State.JOINING,
    (State.STARTING, Happening.START_FAILED): State.REMOVING,
    (State.STARTING, Happening.DRAIN): State.REMOVING,
    (State.JOINING, Happening.JOINED): State.UP,
    (State.JOINING, Happening.DIED): State.DOWN,
    (State.JOINING, Happening.DRAIN): State.REMOVING,
    (State.UP, Happening.SUSPECTED): State.SUSPECT,
    (State.UP, Happening.CONDEMNED): State.CONDEMNED,
    (State.UP, Happening.DIED): State.DOWN,
    (State.UP, Happening.DRAIN): State.DRAINING,
    (State.SUSPECT, Happening.TRUSTED): State.UP,
    (State.SUSPECT, Happening.CONDEMNED): State.CONDEMNED,
    (State.SUSPECT, Happening.DIED): State.DOWN,
    (State.SUSPECT, Happening.DRAIN): State.DRAINING_SUSPECT,
    (State.CONDEMNED, Happening.DIED): State.DOWN,
    (State.CONDEMNED, Happening.DRAIN): State.DOOMED,
    (State.DRAINING, Happening.SUSPECTED): State.DRAINING_SUSPECT,
    (State.DRAINING, Happening.CONDEMNED): State.DOOMED,
    (State.DRAINING, Happening.DIED): State.REMOVING,
    (State.DRAINING, Happening.EMPTIED): State.REMOVING,
    (State.DRAINING, Happening.DRAIN_OVERDUE): State.REMOVING,
    (State.DRAINING_SUSPECT, Happening.TRUSTED): State.DRAINING,
    (State.DRAINING_SUSPECT, Happening.CONDEMNED): State.DOOMED,
    (State.DRAINING_SUSPECT, Happening.DIED): State.REMOVING,
    (State.DRAINING_SUSPECT, Happening.EMPTIED): State.REMOVING,
    (State.DRAINING_SUSPECT, Happening.DRAIN_OVERDUE): State.REMOVING,
    (State.DOOMED, Happening.DIED): State.REMOVING,
    (State.DOOMED, Happening.EMPTIED): State.REMOVING,
    (State.DOOMED, Happening.DRAIN_OVERDUE): State.REMOVING,
    (State.DOWN, Happening.START): State.RESTARTING,
    (State.DOWN, Happening.DRAIN): State.REMOVING,
    (State.RESTARTING, Happening.STARTED): State.REJOINING,
    (State.RESTARTING, Happening.START_FAILED): State.DOWN,
    (State.RESTARTING, Happening.DRAIN): State.REMOVING,
    (State.REJOINING, Happening.JOINED): State.UP,
    (State.REJOINING, Happening.DIED): State.DOWN,
    (State.REJOINING, Happening.DRAIN): State.REMOVING,
    (State.REMOVING, Happening.REMOVED): State.GONE,
}

IGNORED: Final = frozenset(
    {
        # A suspicion is repeated as long as it lasts; trust may follow one that began before the instance was in use.
        (State.SUSPECT, Happening.SUSPECTED),
        (State.DRAINING_SUSPECT, Happening.SUSPECTED),
        (State.UP, Happening.TRUSTED),
        (State.DRAINING, Happening.TRUSTED),
        # Reports, or their absence, no longer matter once an instance is about to die.
        (State.CONDEMNED, Happening.SUSPECTED),
        (State.CONDEMNED, Happening.TRUSTED),
        (State.CONDEMNED, Happening.CONDEMNED),
        (State.DOOMED, Happening.SUSPECTED),
        (State.DOOMED, Happening.TRUSTED),
        (State.DOOMED, Happening.CONDEMNED),
        # It is not in use yet, so nothing must be taken out of use before it dies.
        (State.JOINING, Happening.CONDEMNED),
        (State.REJOINING, Happening.CONDEMNED),
        # The last messages of an engine that is being stopped.
        (State.REMOVING, Happening.CONDEMNED),
        (State.REMOVING, Happening.STARTED),
        (State.REMOVING, Happening.START_FAILED),
        (State.REMOVING, Happening.DIED),
    }
)
"""Happenings that are legal and change nothing. Everything not named here or in TRANSITIONS is a bug of the runtime."""

ALLOWED: Final[dict[State, frozenset[Deed]]] = {
    State.ADDED: frozenset({Deed.BE_DRAINED}),
    State.STARTING: frozenset({Deed.BE_DRAINED}),
    State.JOINING: frozenset({Deed.BE_ASKED, Deed.JOIN, Deed.BE_DRAINED}),
    State.UP: frozenset({Deed.BE_ASKED, Deed.RUN, Deed.TAKE, Deed.TAKE_IN_NEED, Deed.BE_DRAINED}),
    State.SUSPECT: frozenset({Deed.BE_ASKED, Deed.RUN, Deed.TAKE_IN_NEED, Deed.BE_DRAINED}),
    State.CONDEMNED: frozenset({Deed.BE_ASKED, Deed.RUN, Deed.BE_DRAINED}),
    State.DRAINING: frozenset({Deed.BE_ASKED, Deed.RUN}),
    State.DRAINING_SUSPECT: frozenset({Deed.BE_ASKED, Deed.RUN}),
    State.DOOMED: frozenset({Deed.BE_ASKED, Deed.RUN}),
    State.DOWN: frozenset({Deed.BE_RESTARTED, Deed.BE_DRAINED}),
    State.RESTARTING: frozenset({Deed.BE_DRAINED}),
    State.REJOINING: frozenset({Deed.BE_ASKED, Deed.JOIN, Deed.BE_DRAINED}),
    State.REMOVING: frozenset({Deed.BE_REMOVED}),
    State.GONE: frozenset(),
}

FIRST: Final = frozenset({State.ADDED, State.STARTING, State.JOINING})
"""Before it has been up, or has failed to come up, for the first time."""
SILENT: Final = frozenset({State.SUSPECT, State.DRAINING_SUSPECT})

PHASES: Final[dict[State, str]] = {
    **dict.fromkeys((State.ADDED, State.STARTING, State.JOINING), "starting"),
    **dict.fromkeys((State.UP, State.SUSPECT, State.CONDEMNED), "up"),
    **dict.fromkeys((State.DOWN, State.RESTARTING, State.REJOINING), "down"),
    **dict.fromkeys((State.DRAINING, State.DRAINING_SUSPECT, State.DOOMED, State.REMOVING), "draining"),
    State.GONE: "gone",
}
"""One-word summary of each state for operators, who see the state as well."""


class Passage(NamedTuple):
    """
    One transition from a state to the next.

    Attributes:
        happening: What happened.
        state: The state after it.
        at_s: Time, on the caller's clock.
        why: A few words of explanation where there is more to say; else empty.
    """

    happening: Happening
    state: State
    at_s: float
    why: str = ""


class InstanceLife:
    """
    One instance's state and its history.

    Attributes:
        state: The current state.
        history: The last transitions, oldest first.
    """

    def __init__(self, instance_id: InstanceId) -> None:
        """
        Args:
            instance_id: Whose life it is, for errors.
        """
        self._instance_id = instance_id
        self.state = State.ADDED
        self.history: deque[Passage] = deque(maxlen=REMEMBERED)

    def __repr__(self) -> str:
        """For logs and failing tests."""
        return f"InstanceLife({self._instance_id!r}, {self.state.value})"

    def allows(self, deed: Deed) -> bool:
        """Whether this may be done with the instance now."""
        return deed in ALLOWED[self.state]

    def happen(self, happening: Happening, now_s: float, why: str = "") -> bool:
        """
        Apply one happening.

        Args:
            happening: What happened.
            now_s: The time, in seconds on a clock that does not jump.
            why: The reason, for the history.

        Returns:
            Whether the state has changed.

        Raises:
            InvalidTransition: The table does not allow it in this state; nothing has changed.
        """
        key = (self.state, happening)
        if key in IGNORED:
            return False
        if key not in TRANSITIONS:
            raise InvalidTransition(
                f"instance {self._instance_id}", state=self.state.value, event=happening.value, story=self.story()
            )
        self.state = TRANSITIONS[key]
        self.history.append(Passage(happening, self.state, now_s, why))
        return True

    def story(self) -> tuple[str, ...]:
        """States and what led to them, as far back as the history goes."""
        told = [] if len(self.history) == REMEMBERED else [State.ADDED.value]
        for passage in self.history:
            because = f": {passage.why}" if passage.why else ""
            told += [f"({passage.happening.value} at {passage.at_s:.3f} s{because})", passage.state.value]
        return tuple(told)
