"""
Parking: a request that is to compute its prompt on one instance and decode on another waits between the two.

`Dispatch(park=True)` arms a cut when the request is submitted. The instance computes the prompt and the first token
(PREFILLING), and stops there: the request is PARKED with its KV cache pinned under a lease, holding no batch slot, and
`FirstToken` tells the policy. The policy answers with `StartMigration` to an instance with room, at once or later. That
migration has its cut behind it, so it begins in its state PARKED (`core/migration/`): room, pull, first token. If the
target refuses, the request stays parked, the shell renews the lease, and the policy tries another target.

A request that ends with its first token pins nothing. One that is preempted before it stays armed. One that finds no
target for `ParkingLimits.park_s` is taken back: it is recomputed and decodes where it is, and may move like any running
request. If its instance dies, it is an orphan like all others there, and is placed anew with its prompt and its first
token.

`TRANSITIONS` is the whole protocol of parking; `docs/protocols/parking.md` is generated from it.

An engine may run such a request without parking it: it was sent again by somebody who did not know better, or it may
not move. Then its parking is over with its first token (NOT_PARKED). The policy is told nevertheless, and the
`StartMigration` with which it answers is an ordinary one.
"""

import enum
from dataclasses import dataclass, field
from typing import Final, Self

from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.types import RequestId


class ParkingState(enum.Enum):
    """What becomes of a request that was dispatched to be parked."""

    PREFILLING = "prefilling"
    """Its cut is armed: it waits, or computes its prompt."""
    PARKED = "parked"
    """It has its first token, and its KV cache is pinned."""
    LEAVING = "leaving"
    """Parked, and a migration asks for room or pulls its KV cache."""
    OVER = "over"


class ParkingEvent(enum.Enum):
    """What can happen to it."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - a token of text
    NOT_PARKED = "not_parked"
    """It has its first token, and decodes on."""
    MOVE_BEGAN = "move_began"
    MOVE_REFUSED = "move_refused"
    """The migration ended before anything was pulled."""
    MOVE_OVER = "move_over"
    """The migration ended in any other way: the request is elsewhere, recomputes, or is over."""
    TIMED_OUT = "timed_out"
    """It has been parked for too long."""
    LEFT = "left"
    """It ended, its client left, or its instance died."""


class ParkingAction(enum.Enum):
    """What a shell must do, in the given order."""

    TELL = "tell"
    """Emit `FirstToken`."""
    RENEW_LEASE = "renew_lease"
    RELEASE_PIN = "release_pin"
    TAKE_BACK = "take_back"
    """Add the request where it is, without a ticket and with no cut armed."""


_S, _E, _A = ParkingState, ParkingEvent, ParkingAction

TRANSITIONS: Final[dict[tuple[ParkingState, ParkingEvent], tuple[ParkingState, tuple[ParkingAction, ...]]]] = {
    (_S.PREFILLING, _E.FIRST_TOKEN): (_S.PARKED, (_A.TELL,)),
    (_S.PREFILLING, _E.NOT_PARKED): (_S.OVER, (_A.TELL,)),
    # It may have been parked already, unheard.
    (_S.PREFILLING, _E.LEFT): (_S.OVER, (_A.RELEASE_PIN,)),
    (_S.PARKED, _E.MOVE_BEGAN): (_S.LEAVING, (_A.RENEW_LEASE,)),
    (_S.PARKED, _E.TIMED_OUT): (_S.OVER, (_A.RELEASE_PIN, _A.TAKE_BACK)),
    (_S.PARKED, _E.LEFT): (_S.OVER, (_A.RELEASE_PIN,)),
    (_S.LEAVING, _E.MOVE_REFUSED): (_S.PARKED, (_A.RENEW_LEASE,)),
    (_S.LEAVING, _E.MOVE_OVER): (_S.OVER, ()),
    (_S.LEAVING, _E.TIMED_OUT): (_S.LEAVING, ()),
    (_S.LEAVING, _E.LEFT): (_S.OVER, ()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkingLimits:
    """
    How long parking may take.

    Attributes:
        park_s: Seconds from the first token until a request without a target is taken back.
    """

    park_s: float = 5.0

    @classmethod
    def renewing_within(cls, longest_s: float) -> Self:
        """
        The usual limits where a lease lasts for at least this time.

        It is renewed when a migration begins and when it is refused, and nobody renews it between the two.
        """
        return cls(park_s=min(cls().park_s, longest_s))


@dataclass(slots=True)
class Parking:
    """
    One request that was dispatched to be parked.

    Attributes:
        request_id: The request.
        state: The current state.
        parked_s: When it got its first token, on the shell's clock; NaN before.
        story: States and events so far, for errors.
    """

    request_id: RequestId
    state: ParkingState = ParkingState.PREFILLING
    parked_s: float = float("nan")
    story: list[str] = field(default_factory=lambda: [ParkingState.PREFILLING.value])

    def handle(self, event: ParkingEvent) -> tuple[ParkingAction, ...]:
        """
        Make the transition for one event.

        Returns:
            What to do now, in order.

        Raises:
            InvalidTransition: The table does not allow this event in this state; nothing has changed.
        """
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise InvalidTransition(
                f"parking of request {self.request_id}",
                state=self.state.value,
                event=event.value,
                story=tuple(self.story),
            )
        self.state, actions = following
        self.story += [f"({event.value})", self.state.value]
        return actions
