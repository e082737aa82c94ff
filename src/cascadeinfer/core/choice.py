"""
Why an instance was chosen: the candidates with their scores, for operators.

A policy makes a `Choice` where it decides, from the values that it decides by, and its effect carries it to event logs
and stories. Nothing is decided by it afterwards: effects are equal whatever they say of their reasons.
"""

import enum
from dataclasses import dataclass
from typing import Final

from cascadeinfer.core.types import InstanceId

MOST_SCORED: Final = 6
"""Candidates that a choice names, the best ones: a cluster may have hundreds, and a choice is kept per request."""


class Measure(enum.StrEnum):
    """What candidates were compared by; the lowest value wins unless it is among `HIGHEST_WINS`."""

    PRICE = "price"
    """What all requests there and the newcomer wait per token (`Pricing`)."""
    MARGINAL_PRICE = "marginal_price"
    """What the newcomer costs everybody there and itself, per token (`InstanceView.marginal_price`)."""
    BID = "bid"
    """The price in the bids that came (`Bid.price`)."""
    CACHE_GAIN = "cache_gain"
    """What not computing the cached beginning of the prompt saves there, less what the place costs more, per token."""
    PREFIX_SHARE = "prefix_share"
    """The share of the prompt's blocks that was seen there."""
    LOAD = "load"
    """The share of its KV cache or batch slots in use, whichever is larger; more on a slow instance."""
    FREE_STEPS = "free_steps"
    """Llumnix' freeness: decode steps that each request there can take before memory runs out."""
    TOKENS = "tokens"
    """Tokens of the requests there."""
    REQUESTS = "requests"
    """Number of requests there."""
    SENT_TOKENS = "sent_tokens"
    """Prompt tokens that were sent there lately."""
    BACKLOG = "backlog"
    """The time to compute the prompts that wait there."""
    VLLM_SCORE = "vllm_score"
    """The score of vLLM's data-parallel balancer."""


HIGHEST_WINS: Final = frozenset({Measure.CACHE_GAIN, Measure.PREFIX_SHARE, Measure.FREE_STEPS})
IN_TIME: Final = frozenset({Measure.PRICE, Measure.MARGINAL_PRICE, Measure.BID, Measure.CACHE_GAIN, Measure.BACKLOG})
"""Measures that are times: in seconds, or in empty steps where no cost model is known."""


class Rule(enum.StrEnum):
    """How the scores led to the choice."""

    BEST = "best"
    """The best of all candidates, which has room for the request."""
    BEST_WITH_ROOM = "best_with_room"
    """The best of those with room; `n_passed` others had none."""
    NO_ROOM = "no_room"
    """None had room: the best of all, where the request waits."""
    OTHER_STAGE = "other_stage"
    """Its own stage had no room: the best in the nearest stage that had any."""
    SOONER = "sooner"
    """Prompts queue at `instead_of`: the best of those where it starts sooner."""
    CACHED = "cached"
    """The beginning of its prompt is cached there, which is worth more than `instead_of`."""
    IDLE = "idle"
    """It needs a whole cache: the first idle instance."""
    TURN = "turn"
    """Its turn, whatever the load."""
    RANGE = "range"
    """Its range of prompt lengths, while the instances are in balance."""
    OUT_OF_BALANCE = "out_of_balance"
    """The best of all, because the instances are out of balance."""
    DRAWN = "drawn"
    """The best of two drawn at random."""
    PAIRED = "paired"
    """The best that is not yet paired with an instance in more need than `instead_of`, where it was."""


@dataclass(frozen=True, slots=True)
class Scored:
    """
    A candidate.

    Attributes:
        score: What it was compared by (`Measure`).
        load: Its load then, 1.0 is full (`InstanceView.load`); of a bidder, with the request.
        backlog: Time to compute the prompts that waited there, in the unit of prices; 0.0 of a bidder.
    """

    instance_id: InstanceId
    score: float
    load: float
    backlog: float = 0.0


@dataclass(frozen=True, slots=True)
class Declined:
    """A candidate that was asked and does not take the request, and its reason."""

    instance_id: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Why an instance was chosen.

    Attributes:
        rule: How the scores led to it.
        measure: What the scores are; None where nothing was compared.
        scored: The candidates, the best first, which is the one chosen; at most `MOST_SCORED`.
        n_candidates: How many were compared.
        n_passed: How many others were passed over, because they had no room.
        instead_of: Where it would have gone, or where it was, if the rule says so. Its score is its own, or with CACHED
            what had to be beaten.
        declined: Those that were asked and declined.
        in_seconds: Whether times are in seconds; if not, in empty steps.
    """

    rule: Rule
    measure: Measure | None = None
    scored: tuple[Scored, ...] = ()
    n_candidates: int = 0
    n_passed: int = 0
    instead_of: Scored | None = None
    declined: tuple[Declined, ...] = ()
    in_seconds: bool = False
