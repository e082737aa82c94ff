"""
The bid-ask protocol as a transition table: one round, as seen by the asker and by each bidder.

Theory of operation. To give a request away, an agent opens a round: it sends an `Ask` to a few candidates (ASKING).
Each candidate with room reserves it for a moment and sends a `Bid` (OFFERING); the others send a `Decline`. When all
have answered, or time is up, the asker awards the best bid (AWARDING), or rests for a while that grows with every
failure (RESTING). The bidder checks again, keeps the place and accepts (KEEPING), or declines because the place has
gone meanwhile; then the asker awards the next best bid. On `Accept` the asker starts the migration (MOVING), the bidder
sees it arrive (RECEIVING), and `core/migration/` takes over. The request keeps decoding at the asker all the time; a
full or unresponsive stage costs only messages.

Losses. Every state that waits for a message has a time limit. A lost `Ask` or `Bid` is one bid fewer. After a lost
`Award` or `Accept` the asker withdraws and awards the next bid; the bidder's place is released by the `Withdraw` or
when its time is up, which is later than the asker's (`BidAskSettings`), so no migration starts to a place that is gone.
A late message names a round that is over, or a state that does not accept it: the agent (`agent.py`) answers with
`Withdraw` where somebody might be holding a place, and drops the rest.

`TRANSITIONS` is the whole protocol. Conditions (is it the last answer? is there still room?) are in the events' names,
so the table is a plain map. The diagram in `docs/protocols/bidask.md` is generated from it (`python
docs/protocols/draw.py`), and a test compares the two. Source: arXiv 2512.19179, section on decentralised load balance;
the ask-bid-award order is that of the contract net (Smith 1980).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cascadeinfer.core.choice import MOST_SCORED, Choice, Declined, Measure, Rule, Scored
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.errors import InvalidTransition
from cascadeinfer.core.messages import BalanceMessage, Bid
from cascadeinfer.core.types import InstanceId, RequestId

NEVER: Final = float("inf")


class State(enum.Enum):
    """State of a round, for one of its parties."""

    NEW = "new"
    ASKING = "asking"
    """Asker: asks are out."""
    AWARDING = "awarding"
    """Asker: the best bid has been awarded."""
    MOVING = "moving"
    """Asker: the migration is under way."""
    RESTING = "resting"
    """Asker: the round failed; the request is not offered again for a while."""
    OFFERING = "offering"
    """Bidder: a bid is out and its room reserved."""
    KEEPING = "keeping"
    """Bidder: the award is accepted and a place kept."""
    RECEIVING = "receiving"
    """Bidder: the migration is under way."""
    CLOSED = "closed"


class RoundEvent(enum.Enum):
    """What can happen in a round."""

    OPENED = "opened"
    """Asker: the asks have been sent."""
    BID_CAME = "bid_came"
    DECLINE_CAME = "decline_came"
    WON = "won"
    """Asker: the bidding is over and the best bid awarded."""
    NO_BID = "no_bid"
    """Asker: the bidding is over and no (more) bid is worth an award."""
    TURNED_DOWN = "turned_down"
    """Asker: the awarded bidder has declined."""
    UNANSWERED = "unanswered"
    """Asker: the awarded bidder has not answered in time."""
    ACCEPTED = "accepted"
    MOVED = "moved"
    STAYED = "stayed"
    """Asker: the migration ended where it began."""
    RESTED = "rested"
    DROPPED = "dropped"
    """Asker: the request has ended, was lost, or no longer needs to move."""
    ASKED = "asked"
    """Bidder: an ask came and the bid has been sent."""
    AWARDED = "awarded"
    """Bidder: the award came and there is still room."""
    ROOM_GONE = "room_gone"
    """Bidder: the award came too late."""
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    """Bidder: nothing came in time."""
    BEGAN = "began"
    """Bidder: the migration has begun."""
    ENDED = "ended"
    """Bidder: the migration is over, whatever its outcome."""


TRANSITIONS: Final[dict[tuple[State, RoundEvent], State]] = {
    (State.NEW, RoundEvent.OPENED): State.ASKING,
    (State.ASKING, RoundEvent.BID_CAME): State.ASKING,
    (State.ASKING, RoundEvent.DECLINE_CAME): State.ASKING,
    (State.ASKING, RoundEvent.WON): State.AWARDING,
    (State.ASKING, RoundEvent.NO_BID): State.RESTING,
    (State.ASKING, RoundEvent.DROPPED): State.CLOSED,
    (State.AWARDING, RoundEvent.TURNED_DOWN): State.ASKING,
    (State.AWARDING, RoundEvent.UNANSWERED): State.ASKING,
    (State.AWARDING, RoundEvent.ACCEPTED): State.MOVING,
    (State.AWARDING, RoundEvent.DROPPED): State.CLOSED,
    (State.MOVING, RoundEvent.MOVED): State.CLOSED,
    (State.MOVING, RoundEvent.STAYED): State.RESTING,
    (State.MOVING, RoundEvent.DROPPED): State.CLOSED,
    (State.RESTING, RoundEvent.RESTED): State.CLOSED,
    (State.RESTING, RoundEvent.DROPPED): State.CLOSED,
    (State.NEW, RoundEvent.ASKED): State.OFFERING,
    (State.OFFERING, RoundEvent.AWARDED): State.KEEPING,
    (State.OFFERING, RoundEvent.ROOM_GONE): State.CLOSED,
    (State.OFFERING, RoundEvent.WITHDRAWN): State.CLOSED,
    (State.OFFERING, RoundEvent.EXPIRED): State.CLOSED,
    (State.KEEPING, RoundEvent.WITHDRAWN): State.CLOSED,
    (State.KEEPING, RoundEvent.EXPIRED): State.CLOSED,
    (State.KEEPING, RoundEvent.BEGAN): State.RECEIVING,
    (State.RECEIVING, RoundEvent.ENDED): State.CLOSED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BidAskSettings:
    """
    Numbers of the protocol.

    Attributes:
        max_migrations: Per instance, both directions together. Paper: 3; more at once slows decoding on both sides.
        fan_out: Candidates asked per round.
        bid_wait_s: How long the asker waits for bids; a round closes earlier when all have answered.
        award_wait_s: How long it waits for the accept.
        offer_life_s: How long a bidder reserves room for a bid; covers the asker's wait and one rejected award.
        keep_life_s: How long it keeps an awarded place. Longer than `award_wait_s`, so that no migration starts to a
            place that is gone.
        rest_s: First pause after a failure; doubles up to `rest_s_max`.
        busy_s: Pause after a round in which a candidate was only busy with other migrations; does not grow.
        advert_interval_s: Time between two adverts of one instance.
        advert_fan_out: Peers that each advert goes to, in turns.
        heard_life_s: How long an advertised load counts.
        imbalance_load: Difference from the peers' mean above which an instance is overloaded.
        imbalance_share: The same as a share of that mean; both must be exceeded.
        headroom_blocks: Blocks a bidder keeps free, beside one per request: requests grow.
    """

    max_migrations: int = 3
    fan_out: int = 3
    bid_wait_s: float = 0.1
    award_wait_s: float = 0.2
    offer_life_s: float = 0.6
    keep_life_s: float = 0.5
    rest_s: float = 0.25
    busy_s: float = 0.1
    rest_s_max: float = 8.0
    advert_interval_s: float = 1.0
    advert_fan_out: int = 2
    heard_life_s: float = 4.0
    imbalance_load: float = 0.1
    imbalance_share: float = 0.25
    headroom_blocks: int = 8


@dataclass(slots=True, eq=False)
class Round:
    """
    One round, as one of its parties keeps it.

    Attributes:
        ask_id: Its name; chosen by the asker, unique.
        partner_id: Asker: the awarded bidder, once there is one. Bidder: the asker.
        deadline_s: When this state's time is up; infinite without a limit.
        pending: Asker: candidates that have not answered, in order of asking.
        bids: Asker: bids that have arrived and were not turned down.
        busy: Asker: a candidate declined only because of too many migrations at once, which passes soon.
        declined: Asker: candidates that do not take the request, with their reasons.
        choice: Asker: why the awarded bidder was chosen.
        distances: Asker: what the way to a candidate adds to its price; candidates that are near are left out.
    """

    ask_id: str
    request_id: RequestId
    length_tokens: int
    reason: MigrationReason
    partner_id: InstanceId | None = None
    deadline_s: float = NEVER
    pending: dict[InstanceId, None] = field(default_factory=dict)
    bids: dict[InstanceId, Bid] = field(default_factory=dict)
    busy: bool = False
    declined: dict[InstanceId, str] = field(default_factory=dict)
    choice: Choice | None = None
    distances: dict[InstanceId, float] = field(default_factory=dict)
    state: State = State.NEW

    def handle(self, event: RoundEvent) -> None:
        """
        Apply one event.

        Raises:
            InvalidTransition: The table does not allow it in this state; nothing has changed.
        """
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise InvalidTransition(
                f"round {self.ask_id} of request {self.request_id}", state=self.state.value, event=event.value
            )
        self.state = after

    def ranked_bids(self) -> list[tuple[InstanceId, Bid]]:
        """
        The bids, that with the lowest price first, the way there included; ties by load, then fewest migrations, then
        smallest id.
        """
        return sorted(
            self.bids.items(), key=lambda item: (self.price_of(*item), item[1].load, item[1].migrations, item[0])
        )

    def price_of(self, bidder_id: InstanceId, bid: Bid) -> float:
        """The price of a bid with what the way there adds."""
        return bid.price + self.distances.get(bidder_id, 0.0)

    def choice_among(self, bids: Sequence[tuple[InstanceId, Bid]], *, in_seconds: bool) -> Choice:
        """Why the first of these ranked bids is awarded; `in_seconds`: the unit of their prices."""
        scored = tuple([Scored(bidder, self.price_of(bidder, bid), bid.load) for bidder, bid in bids[:MOST_SCORED]])
        declined = tuple([Declined(*decline) for decline in self.declined.items()])
        return Choice(Rule.BEST, Measure.BID, scored, len(bids), declined=declined, in_seconds=in_seconds)


@dataclass(frozen=True, slots=True)
class Move:
    """A migration to start; `ask_id` names the round it comes from, `choice` says why it goes there."""

    ask_id: str
    request_id: RequestId
    target_id: InstanceId
    reason: MigrationReason
    choice: Choice | None = None


@dataclass(slots=True)
class Outbox:
    """What an agent wants done: messages to send (with their recipients), migrations to start."""

    messages: list[tuple[InstanceId, BalanceMessage]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
