"""
The bid-ask protocol's vocabulary: what agents say to one another.

An agent that must give a request away (it outgrew the stage, or the instance is overloaded) sends an `Ask` to candidates;
each answers with a `Bid` or a `Decline`; the asker sends the best bidder an `Award`, and the bidder confirms with `Accept`
(place reserved) or `Decline`; a late or beaten bid is let go with `Withdraw`. Only then does the asker start the migration. An
`Advert` tells a stage peer one's load, so that it can see whether it is overloaded. `bidask.py` has the order in which they may come.
"""

from dataclasses import dataclass
from typing import TypeAlias

from cascadeinfer.core.types import RequestId


@dataclass(frozen=True, slots=True)
class Ask:
    """
    Will you take this request? `ask_id` names the round; answers carry it.

    Attributes:
        reason: A `MigrationReason`.
        load: The asker's load, the request counted; a bid for a rebalancing must be lower.

    """

    ask_id: str
    request_id: RequestId
    length_tokens: int
    reason: str
    load: float = 0.0


@dataclass(frozen=True, slots=True)
class Bid:
    """
    Yes, on these terms.

    Attributes:
        load: The bidder's load after taking the request (dimensionless, lower is better).
        free_blocks: KV blocks it could still give.
        migrations: Migrations it takes part in now.
        price: What the bidder's next step costs its requests and this one (`core/view.py`); of bids the lowest wins.

    """

    ask_id: str
    load: float
    free_blocks: int
    migrations: int
    price: float = 0.0


@dataclass(frozen=True, slots=True)
class Award:
    """You have it: keep a place for the request."""

    ask_id: str
    request_id: RequestId
    length_tokens: int


@dataclass(frozen=True, slots=True)
class Accept:
    """The place is kept: start the migration."""

    ask_id: str


@dataclass(frozen=True, slots=True)
class Decline:
    """No. `reason` is a metric label."""

    ask_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The round is over for you: forget the bid or the kept place."""

    ask_id: str


@dataclass(frozen=True, slots=True)
class Advert:
    """My load (dimensionless, 1.0 is full). To stage peers, now and then; wants no answer."""

    load: float


BalanceMessage: TypeAlias = Ask | Bid | Award | Accept | Decline | Withdraw | Advert
