"""
The bid-ask agent of one instance: which requests to offer, whose bids to take.

It sees its own instance (`InstanceView` and its requests), the public layout in force with the kinds of its instances,
and the messages sent to it; of other instances it knows only what they told it. It hands over requests that have
outgrown the stage, moves requests to stage peers when it is overloaded, and empties a draining instance. Messages to
send and migrations to start go into an `Outbox`; the caller passes in the time. The protocol is in `rounds.py`, its two
sides in `asker.py` and `bidder.py`.

Rules:
- At most `max_migrations` at once, in both directions together; migrations, kept places and pending awards count.
- An instance is overloaded when its load exceeds the mean of its stage peers' advertised loads both by `imbalance_load`
  and by the share `imbalance_share` of that mean. It then moves one request at a time, of about half the difference in
  size, and only to a bidder that will still be less loaded than the asker is now.
- A draining instance first asks the stage that covers the request's length, and after each failure a stage further
  away.
- Only instances that could hold the request at its longest are asked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from cascadeinfer.core.bidask.asker import Asker
from cascadeinfer.core.bidask.bidder import Bidder
from cascadeinfer.core.bidask.handover import HandoverRules, may_move, movable, outgrown
from cascadeinfer.core.bidask.rounds import BidAskSettings, Outbox, State
from cascadeinfer.core.effects import MigrationReason
from cascadeinfer.core.events import MigrationOutcome
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Accept, Advert, Ask, Award, BalanceMessage, Bid, Decline, Withdraw
from cascadeinfer.core.roster import Roster
from cascadeinfer.core.types import UNBOUNDED_TOKENS, InstanceId, RequestId
from cascadeinfer.core.view import InstanceView, RequestView


class Agent:
    """
    One instance's agent. See the module header.

    Attributes:
        asker: Its rounds as asker.
        bidder: Its rounds as bidder.
    """

    def __init__(
        self,
        own: InstanceView,
        requests: Mapping[RequestId, RequestView],
        roster: Roster,
        *,
        name: str,
        settings: BidAskSettings,
        rules: HandoverRules,
        able: Callable[[RequestView, Sequence[InstanceId]], Sequence[InstanceId]],
        extra_s: Callable[[InstanceId, InstanceId, int], float],
        rebalance: bool = True,
    ) -> None:
        """
        Args:
            own: The instance.
            requests: All requests by id; the agent looks only at those of its instance.
            roster: The layout in force, which is public.
            name: Prefix of its rounds' names; unique among all agents that ever existed.
            settings: Numbers of the protocol.
            rules: When a request is handed over.
            able: Those of these instances that could hold a request at its longest (`ClusterView.able_ids`).
            extra_s: How much longer a move takes over a far link (`Links.extra_s`).
            rebalance: Whether it moves requests to stage peers when it is overloaded.
        """
        self.asker = Asker(own, settings, name, self.slots_taken, self._may_go, extra_s)
        self.bidder = Bidder(own, settings, self.slots_taken)
        self._own = own
        self._requests = requests
        self._roster = roster
        self._settings = settings
        self._rules = rules
        self._able = able
        self._rebalances = rebalance
        self._adverts = 0
        self._next_advert_s = 0.0

    def slots_taken(self) -> int:
        """Migrations, kept places and awards under way."""
        return self._own.migrations + self.bidder.kept + self.asker.awarding

    def review(self, now_s: float, out: Outbox) -> None:
        """Review this instance, e.g. after its report: which requests should go, and which peers should be told."""
        if self.asker.rounds:
            self.asker.end_rests(now_s)
        layout = self._roster.layout
        if layout is None:
            return
        index = self._roster.stage_of.get(self._own.instance_id)
        if index is None:
            self._empty(layout, now_s, out)
            return
        stage = layout.stages[index]
        self._hand_over(layout, stage.range.hi_tokens, now_s, out)
        if self._rebalances and len(stage.instance_ids) > 1:
            self._rebalance(stage.instance_ids, now_s, out)
            if now_s >= self._next_advert_s:
                self._advertise(stage.instance_ids, now_s, out)

    def receive(self, sender_id: InstanceId, message: BalanceMessage, now_s: float, out: Outbox) -> None:
        """Handle a message; it may be late or a duplicate."""
        match message:
            case Ask():
                self.asker.heard[sender_id] = (message.load, now_s)
                self.bidder.take_ask(sender_id, message, now_s, out)
            case Bid():
                self.asker.heard[sender_id] = (message.load, now_s)
                self.asker.take_bid(sender_id, message, now_s, out)
            case Award():
                self.bidder.take_award(sender_id, message, now_s, out)
            case Accept():
                self.asker.take_accept(sender_id, message, now_s, out)
            case Decline():
                self.asker.take_decline(sender_id, message, now_s, out)
            case Withdraw():
                self.bidder.take_withdraw(sender_id, message)
            case Advert():
                self.asker.heard[sender_id] = (message.load, now_s)
            case _:
                assert_never(message)

    def wake(self, now_s: float, out: Outbox) -> None:
        """Handle the deadlines that have passed."""
        self.bidder.wake(now_s)
        self.asker.wake(now_s, out)

    def next_wake_s(self) -> float:
        """When `wake` should be called next; infinite when never."""
        return min(self.bidder.next_wake_s(), self.asker.next_wake_s())

    def request_left(self, request_id: RequestId, out: Outbox) -> None:
        """Handle a request of this instance that has ended or was taken away."""
        self.asker.request_left(request_id, out)

    def move_ended(self, ask_id: str, outcome: MigrationOutcome, now_s: float) -> None:
        """Handle the end of a migration from or to this instance."""
        self.bidder.move_ended(ask_id)
        self.asker.move_ended(ask_id, outcome, now_s)

    def _may_go(self, request_id: RequestId, target_id: InstanceId) -> bool:
        request = self._requests.get(request_id)
        return request is not None and target_id in self._roster.stage_of and may_move(request, self._own, self._rules)

    def _free_slots(self) -> int:
        return self._settings.max_migrations - self.slots_taken() - self.asker.asking

    def _hand_over(self, layout: StageLayout, hi_tokens: int, now_s: float, out: Outbox) -> None:
        reason = MigrationReason.OUTGREW_STAGE
        if hi_tokens >= UNBOUNDED_TOKENS or not self.asker.may_ask(reason, now_s):
            return
        slots: int | None = None
        for request in outgrown(self._own, hi_tokens, self._requests, self._rules):
            slots = self._free_slots() if slots is None else slots
            if slots <= 0:
                return
            if request.request_id not in self.asker.rounds:
                stage = layout.stages[layout.stage_index_of(request.tokens)]
                candidates = self._able(request, stage.instance_ids)
                slots -= self.asker.open(request, reason, candidates, now_s, out)

    def _empty(self, layout: StageLayout, now_s: float, out: Outbox) -> None:
        """Offer every request to other instances."""
        if not self.asker.may_ask(MigrationReason.DRAIN, now_s):
            return
        slots = self._free_slots()
        for request in movable(self._own, self._requests, self._rules):
            if slots <= 0:
                return
            if request.request_id in self.asker.rounds:
                continue
            home = layout.stage_index_of(request.tokens)
            by_distance = sorted(range(len(layout.stages)), key=lambda index: (abs(index - home), index))
            able = [self._able(request, layout.stages[index].instance_ids) for index in by_distance]
            able = [instance_ids for instance_ids in able if instance_ids]
            if able:
                candidates = able[self.asker.failures(request.request_id) % len(able)]
                slots -= self.asker.open(request, MigrationReason.DRAIN, candidates, now_s, out)

    def _rebalance(self, stage_ids: tuple[InstanceId, ...], now_s: float, out: Outbox) -> None:
        settings = self._settings
        load = self._own.load
        if load < settings.imbalance_load or not self.asker.may_ask(MigrationReason.REBALANCE, now_s):
            return
        oldest_s = now_s - settings.heard_life_s
        heard = self.asker.heard
        loads = [heard[i][0] for i in stage_ids if i in heard and heard[i][1] >= oldest_s]
        if not loads:
            return
        mean = sum(loads) / len(loads)
        gap = load - mean
        if gap < max(settings.imbalance_load, settings.imbalance_share * mean) or self._free_slots() <= 0:
            return
        rounds = self.asker.rounds.values()
        if any(r.reason is MigrationReason.REBALANCE and r.state is not State.RESTING for r in rounds):
            return
        request = self._about_half(gap, stage_ids)
        if request is not None:
            self.asker.open(request, MigrationReason.REBALANCE, self._able(request, stage_ids), now_s, out)

    def _about_half(self, gap: float, stage_ids: tuple[InstanceId, ...]) -> RequestView | None:
        """The request whose move comes nearest to halving the gap without reversing it; None when there is none."""
        capacity = self._own.capacity
        best: tuple[float, int, int] | None = None
        chosen: RequestView | None = None
        for request in movable(self._own, self._requests, self._rules):
            share = max(request.tokens / capacity.kv_tokens, 1.0 / capacity.max_num_seqs)
            if request.request_id in self.asker.rounds or share >= gap:
                continue
            rank = (abs(share - gap / 2.0), request.tokens, request.arrival)
            if (best is None or rank < best) and self._has_taker(request, stage_ids):
                best, chosen = rank, request
        return chosen

    def _has_taker(self, request: RequestView, stage_ids: tuple[InstanceId, ...]) -> bool:
        """Whether a stage peer could hold the request."""
        return any(instance_id != self._own.instance_id for instance_id in self._able(request, stage_ids))

    def _advertise(self, stage_ids: tuple[InstanceId, ...], now_s: float, out: Outbox) -> None:
        """Advertise the load to the peers whose turn it is, round-robin from this instance's position."""
        self._next_advert_s = now_s + self._settings.advert_interval_s
        n = len(stage_ids)
        own_place = stage_ids.index(self._own.instance_id)
        for _ in range(min(self._settings.advert_fan_out, n - 1)):
            peer = stage_ids[(own_place + 1 + self._adverts % (n - 1)) % n]
            out.messages.append((peer, Advert(self._own.load)))
            self._adverts += 1
