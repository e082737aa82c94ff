"""
The bid-ask protocol's vocabulary: the messages between agents.

An agent that must give a request away (it outgrew the stage, or the instance is overloaded) sends an `Ask` to
candidates; each answers with a `Bid` or a `Decline`. The asker sends the best bidder an `Award`, which the bidder
confirms with `Accept` (place reserved) or turns down with `Decline`; a late or losing bid is released with `Withdraw`.
Only then does the asker start the migration. An `Advert` tells a stage peer the sender's load, so that the peer can see
whether it is overloaded. `bidask/rounds.py` defines the order in which messages may come.
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
        load: The asker's load, including the request; a bid for rebalancing must be lower.
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
        free_blocks: KV blocks it can still provide.
        migrations: Migrations it takes part in now.
        price: Cost of the bidder's next step to its requests and this one (`core/view.py`); the lowest bid wins.
    """

    ask_id: str
    load: float
    free_blocks: int
    migrations: int
    price: float = 0.0


@dataclass(frozen=True, slots=True)
class Award:
    """Your bid won: keep a place for the request."""

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
    """My load (dimensionless, 1.0 is full). Sent to stage peers now and then; expects no answer."""

    load: float


BalanceMessage: TypeAlias = Ask | Bid | Award | Accept | Decline | Withdraw | Advert
