"""
The asker's side of an instance's agent: rounds of asks, bids and awards, and the back-off after them.

The caller names the request to give away and the candidates (`open`); the asker decides whom to ask, whom to award and
when to try again. A request that finds no taker, or whose migration ends where it began, backs off exponentially. So
does the asker, per reason, after a round without a taker, so that a full stage is not flooded by its neighbours'
requests. Both pauses are short where a candidate was only busy with other migrations. See `rounds.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cascadeinfer.core.bidask.bidder import BUSY
from cascadeinfer.core.bidask.rounds import NEVER, BidAskSettings, Move, Outbox, Round, RoundEvent, State
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.messages import Accept, Ask, Award, Bid, Decline, Withdraw
from cascadeinfer.core.types import InstanceId, RequestId
from cascadeinfer.core.view import InstanceView, RequestView

NO_ANSWER: Final = "no answer"
"""What a candidate that is silent is taken to say."""


class Asker:
    """
    One instance as asker.

    Attributes:
        rounds: Rounds that are not closed, by request, including those at rest.
        heard: Loads that other instances have advertised, with the time.
    """

    def __init__(
        self,
        own: InstanceView,
        settings: BidAskSettings,
        name: str,
        slots_taken: Callable[[], int],
        may_go: Callable[[RequestId, InstanceId], bool],
        extra_s: Callable[[InstanceId, InstanceId, int], float],
    ) -> None:
        """
        Args:
            own: The instance.
            settings: Numbers of the protocol.
            name: Prefix of its rounds' names; unique among all askers that ever existed.
            slots_taken: This instance's migrations, kept places and awards under way.
            may_go: Whether a request can (still) be moved to an instance; asked when the accept comes.
            extra_s: See `Links.extra_s`.
        """
        self.rounds: dict[RequestId, Round] = {}
        self.heard: dict[InstanceId, tuple[float, float]] = {}
        self._own = own
        self._settings = settings
        self._name = name
        self._slots_taken = slots_taken
        self._may_go = may_go
        self._extra_s = extra_s
        self._opened = 0
        self._failures: dict[RequestId, int] = {}
        self._asks_from_s = dict.fromkeys(MigrationReason, 0.0)
        self._fruitless = dict.fromkeys(MigrationReason, 0)

    @property
    def awarding(self) -> int:
        """Awards under way."""
        return sum(r.state is State.AWARDING for r in self.rounds.values()) if self.rounds else 0

    @property
    def asking(self) -> int:
        """Rounds that are waiting for bids."""
        return sum(r.state is State.ASKING for r in self.rounds.values()) if self.rounds else 0

    def may_ask(self, reason: MigrationReason, now_s: float) -> bool:
        """Whether a round may be opened for this reason, i.e. no pause after a failed one is running."""
        return now_s >= self._asks_from_s[reason]

    def failures(self, request_id: RequestId) -> int:
        """Rounds and migrations of this request that failed."""
        return self._failures.get(request_id, 0)

    def open(
        self,
        request: RequestView,
        reason: MigrationReason,
        candidates: Sequence[InstanceId],
        now_s: float,
        out: Outbox,
    ) -> bool:
        """
        Ask the best of these candidates to take a request that is in no round.

        Returns:
            False when there was nobody to ask.
        """
        distances = self._distances(candidates, request.tokens)
        chosen = self._choose(candidates, distances, now_s)
        if not chosen:
            return False
        self._opened += 1
        asked = Round(f"{self._name}:{self._opened}", request.request_id, request.tokens, reason)
        asked.handle(RoundEvent.OPENED)
        asked.deadline_s = now_s + self._settings.bid_wait_s
        asked.pending = dict.fromkeys(chosen)
        asked.distances = distances
        self.rounds[request.request_id] = asked
        ask = Ask(asked.ask_id, asked.request_id, asked.length_tokens, reason.value, self._own.load)
        out.messages += [(candidate, ask) for candidate in chosen]
        return True

    def _distances(self, candidates: Sequence[InstanceId], tokens: int) -> dict[InstanceId, float]:
        """
        What the way to those that are far adds to their bids: one request waits for it, once, over the tokens that it
        will produce, as a newcomer waits for its first token (`Pricing`). Only prices in seconds can tell.
        """
        pricing = self._own.pricing
        if not pricing.in_seconds:
            return {}
        own_id = self._own.instance_id
        extra = {candidate: self._extra_s(own_id, candidate, tokens) for candidate in candidates}
        return {candidate: pricing.urgency * extra_s for candidate, extra_s in extra.items() if extra_s > 0.0}

    def _choose(
        self, candidates: Sequence[InstanceId], distances: Mapping[InstanceId, float], now_s: float
    ) -> list[InstanceId]:
        """
        The `fan_out` candidates with the lowest recently heard load; unheard ones count as idle. All candidates take
        turns. The last of them gives way to the best that is near, if none of them is.
        """
        oldest_s = now_s - self._settings.heard_life_s
        own_id = self._own.instance_id
        n = len(candidates)
        ranked: list[tuple[float, int, InstanceId]] = []
        for place, candidate in enumerate(candidates):
            if candidate != own_id:
                load, heard_s = self.heard.get(candidate, (0.0, -NEVER))
                ranked.append((load if heard_s >= oldest_s else 0.0, (place + self._opened) % n, candidate))
        by_load = [candidate for _, _, candidate in sorted(ranked)]
        chosen, rest = by_load[: self._settings.fan_out], by_load[self._settings.fan_out :]
        if distances and all(candidate in distances for candidate in chosen):
            near = next((candidate for candidate in rest if candidate not in distances), None)
            return chosen if near is None else [*chosen[:-1], near]
        return chosen

    def take_bid(self, sender_id: InstanceId, bid: Bid, now_s: float, out: Outbox) -> None:
        """Record a bid; withdraw from one that is too late."""
        asked = self._named(bid.ask_id)
        if asked is None or asked.state is not State.ASKING or sender_id not in asked.pending:
            said_twice = asked is not None and (sender_id in asked.bids or sender_id == asked.partner_id)
            if not said_twice:
                out.messages.append((sender_id, Withdraw(bid.ask_id)))
            return
        asked.handle(RoundEvent.BID_CAME)
        del asked.pending[sender_id]
        asked.bids[sender_id] = bid
        if not asked.pending:
            self._close_bidding(asked, now_s, out)

    def take_decline(self, sender_id: InstanceId, message: Decline, now_s: float, out: Outbox) -> None:
        """Handle a candidate that does not bid, or a bidder that cannot keep its bid."""
        asked = self._named(message.ask_id)
        if asked is None:
            return
        asked.busy |= message.reason == BUSY
        if asked.state is State.ASKING and sender_id in asked.pending:
            asked.handle(RoundEvent.DECLINE_CAME)
            del asked.pending[sender_id]
            asked.declined[sender_id] = message.reason
            if not asked.pending:
                self._close_bidding(asked, now_s, out)
        elif asked.state is State.AWARDING and sender_id == asked.partner_id:
            asked.handle(RoundEvent.TURNED_DOWN)
            asked.declined[sender_id] = message.reason
            self._close_bidding(asked, now_s, out)

    def take_accept(self, sender_id: InstanceId, message: Accept, now_s: float, out: Outbox) -> None:
        """The place is kept: start the migration if it is still possible."""
        asked = self._named(message.ask_id)
        if asked is None or sender_id != asked.partner_id or asked.state not in {State.AWARDING, State.MOVING}:
            out.messages.append((sender_id, Withdraw(message.ask_id)))
            return
        if asked.state is State.MOVING:
            return  # a duplicate
        if not self._may_go(asked.request_id, sender_id):
            self._drop(asked, out)
            return
        asked.handle(RoundEvent.ACCEPTED)
        asked.deadline_s = NEVER
        self._withdraw_rest(asked, out)
        self._fruitless[asked.reason] = 0
        self._asks_from_s[asked.reason] = now_s
        out.moves.append(Move(asked.ask_id, asked.request_id, sender_id, asked.reason, asked.choice))

    def move_ended(self, ask_id: str, outcome: MigrationOutcome, now_s: float) -> None:
        """Handle the end of a migration from this instance."""
        asked = self._named(ask_id)
        if asked is None or asked.state is not State.MOVING:
            return
        if outcome is MigrationOutcome.STAYED:
            asked.handle(RoundEvent.STAYED)
            self._rest(asked, now_s)
            return
        moved = outcome in {MigrationOutcome.MOVED, MigrationOutcome.RECOMPUTED}
        asked.handle(RoundEvent.MOVED if moved else RoundEvent.DROPPED)
        self._forget(asked)

    def request_left(self, request_id: RequestId, out: Outbox) -> None:
        """Handle a request of this instance that has ended or was taken away."""
        asked = self.rounds.get(request_id)
        if asked is not None and asked.state is not State.MOVING:
            self._drop(asked, out)
        self._failures.pop(request_id, None)

    def end_rests(self, now_s: float) -> None:
        """Forget the rests that are over, so that their requests can be offered again."""
        for asked in [r for r in self.rounds.values() if r.state is State.RESTING and r.deadline_s <= now_s]:
            asked.handle(RoundEvent.RESTED)
            del self.rounds[asked.request_id]

    def wake(self, now_s: float, out: Outbox) -> None:
        """Go on without candidates that have not answered in time."""
        due = [r for r in self.rounds.values() if r.deadline_s <= now_s and r.state is not State.RESTING]
        for asked in due:
            if asked.state is State.AWARDING:
                assert asked.partner_id is not None
                out.messages.append((asked.partner_id, Withdraw(asked.ask_id)))
                asked.handle(RoundEvent.UNANSWERED)
                asked.declined[asked.partner_id] = NO_ANSWER
            asked.declined.update(dict.fromkeys(asked.pending, NO_ANSWER))
            self._close_bidding(asked, now_s, out)

    def next_wake_s(self) -> float:
        """The earliest deadline; infinite when there is none. Rests do not count."""
        return min([r.deadline_s for r in self.rounds.values() if r.state is not State.RESTING], default=NEVER)

    def _close_bidding(self, asked: Round, now_s: float, out: Outbox) -> None:
        """Award the best remaining bid, or rest."""
        asked.pending.clear()
        bids = asked.ranked_bids()
        free = self._slots_taken() < self._settings.max_migrations
        if bids and free and (asked.reason is not MigrationReason.REBALANCE or bids[0][1].load < self._own.load):
            best_id = bids[0][0]
            asked.handle(RoundEvent.WON)
            asked.partner_id = best_id
            asked.choice = asked.choice_among(bids, in_seconds=self._own.pricing.in_seconds)
            asked.deadline_s = now_s + self._settings.award_wait_s
            del asked.bids[best_id]
            out.messages.append((best_id, Award(asked.ask_id, asked.request_id, asked.length_tokens)))
            return
        asked.handle(RoundEvent.NO_BID)
        self._withdraw_rest(asked, out)
        self._rest(asked, now_s)
        if not self.may_ask(asked.reason, now_s):
            return  # rounds that end at the same time count once
        if asked.busy:
            self._asks_from_s[asked.reason] = now_s + self._settings.busy_s
            return
        fruitless = self._fruitless[asked.reason]
        self._asks_from_s[asked.reason] = now_s + self._pause_s(fruitless)
        self._fruitless[asked.reason] = fruitless + 1

    def _rest(self, asked: Round, now_s: float) -> None:
        if asked.busy:
            asked.deadline_s = now_s + self._settings.busy_s
            return
        failures = self._failures.get(asked.request_id, 0)
        self._failures[asked.request_id] = failures + 1
        asked.deadline_s = now_s + self._pause_s(failures)

    def _pause_s(self, failures: int) -> float:
        return min(self._settings.rest_s_max, self._settings.rest_s * float(1 << min(failures, 16)))

    def _named(self, ask_id: str) -> Round | None:
        return next((asked for asked in self.rounds.values() if asked.ask_id == ask_id), None)

    def _drop(self, asked: Round, out: Outbox) -> None:
        """Give up a round that is no longer needed."""
        if asked.state is State.AWARDING:
            assert asked.partner_id is not None
            out.messages.append((asked.partner_id, Withdraw(asked.ask_id)))
        self._withdraw_rest(asked, out)
        asked.handle(RoundEvent.DROPPED)
        self._forget(asked)

    def _forget(self, asked: Round) -> None:
        del self.rounds[asked.request_id]
        self._failures.pop(asked.request_id, None)

    def _withdraw_rest(self, asked: Round, out: Outbox) -> None:
        out.messages += [(bidder, Withdraw(asked.ask_id)) for bidder in (*asked.pending, *asked.bids)]
        asked.pending.clear()
        asked.bids.clear()
